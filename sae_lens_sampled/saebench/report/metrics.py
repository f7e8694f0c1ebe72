"""Metrics of the report: their places in the results, their better directions, and their means over seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sae_lens_sampled.confidence import Interval, mean_interval
from sae_lens_sampled.saebench.report.results import SAEResults

CORE = ("core", "eval_result_metrics")
OURS = ("core", "eval_result_unstructured")
PROBING = ("sparse_probing", "eval_result_metrics", "sae")
ABSORPTION = ("absorption", "eval_result_metrics", "mean")
MMCS = ("mmcs", "eval_result_metrics")


@dataclass(frozen=True)
class Metric:
    """A metric, shown as one column of a table."""

    name: str
    path: tuple[str, ...]
    better: Literal["higher", "lower"] | None
    """The better direction; None if there is none, as for L0: the other metrics are compared at equal L0."""
    digits: int
    independent: bool = True
    """Whether the values of different seeds are independent; if not, their spread gives no error of the mean."""
    complement: tuple[str, ...] = ()
    """Path of one minus the metric, for results that have nothing at `path`."""

    @property
    def axis_title(self) -> str:
        """The name with the better direction."""
        return f"{self.name} ({self.better} is better)" if self.better else self.name

    def of(self, sae: SAEResults) -> float | None:
        """This metric's value for one SAE, or None if it was not measured."""
        value = sae.number(*self.path)
        rest = sae.number(*self.complement)
        return 1 - rest if value is None and rest is not None else value


FVU = Metric("FVU", (*OURS, "exported", "fvu"), "lower", 4)
L0 = Metric("L0", (*CORE, "sparsity", "l0"), None, 2)
DEAD = Metric(
    "Dead share", (*OURS, "exported", "dead_share"), "lower", 3, complement=(*CORE, "misc_metrics", "frac_alive")
)
TOP_1 = Metric("Top-1 accuracy", (*PROBING, "sae_top_1_test_accuracy"), "higher", 3)
FRACTION = Metric("Mean absorption fraction", (*ABSORPTION, "mean_absorption_fraction_score"), "lower", 3)

SECTIONS: dict[str, list[Metric]] = {
    "Sparsity": [
        L0,
        Metric("L0 in training", (*OURS, "in_training", "l0"), None, 2),
        DEAD,
        Metric("Gini of firing counts", (*OURS, "exported", "gini"), None, 3),
    ],
    "Reconstruction": [
        FVU,
        Metric("FVU in training", (*OURS, "in_training", "fvu"), "lower", 4),
        Metric("EV (SAEBench's formula, not R²)", (*CORE, "reconstruction_quality", "explained_variance"), "higher", 4),
        Metric("Legacy EV, per token", (*CORE, "reconstruction_quality", "explained_variance_legacy"), "higher", 4),
        Metric(
            "CE loss score (loss recovered)", (*CORE, "model_performance_preservation", "ce_loss_score"), "higher", 4
        ),
        Metric("KL score", (*CORE, "model_behavior_preservation", "kl_div_score"), "higher", 4),
    ],
    "Sparse probing": [
        TOP_1,
        Metric("Top-2 accuracy", (*PROBING, "sae_top_2_test_accuracy"), "higher", 3),
        Metric("Top-5 accuracy", (*PROBING, "sae_top_5_test_accuracy"), "higher", 3),
        Metric("Accuracy with all latents", (*PROBING, "sae_test_accuracy"), "higher", 3),
    ],
    "Absorption": [
        FRACTION,
        Metric("Full absorption", (*ABSORPTION, "mean_full_absorption_score"), "lower", 3),
    ],
    "Similarity of seeds": [
        Metric("MMCS of decoders", (*MMCS, "decoder", "mmcs"), "higher", 3, independent=False),
        Metric("MMCS of encoders", (*MMCS, "encoder", "mmcs"), "higher", 3, independent=False),
        Metric("MMCS of random directions", (*MMCS, "decoder", "baseline"), None, 3, independent=False),
    ],
}


@dataclass(frozen=True)
class Group:
    """SAEs of one class whose names differ only in the seed."""

    sae_class: str
    name: str
    saes: tuple[SAEResults, ...]

    def estimate(self, metric: Metric) -> Interval | None:
        """Mean over the group's SAEs that have a value; None if none has."""
        values = [value for sae in self.saes if (value := metric.of(sae)) is not None]
        return estimate(values, metric.independent) if values else None


def estimate(values: Sequence[float], independent: bool = True) -> Interval:
    """Mean of at least one value, with its 95 % interval if the values are independent."""
    if independent:
        return mean_interval(values)
    return replace(mean_interval([statistics.fmean(values)]), n=len(values))


def groups_of(saes: Sequence[SAEResults]) -> list[Group]:
    """Group SAEs whose names differ only in the seed; equal names of different classes give different groups."""
    members: dict[tuple[str, str], list[SAEResults]] = {}
    for sae in saes:
        members.setdefault((sae.sae_class, sae.group), []).append(sae)
    return [Group(sae_class, name, tuple(members[sae_class, name])) for sae_class, name in sorted(members)]


def best_mean(metric: Metric, groups: Sequence[Group]) -> float | None:
    """The best mean, rounded as displayed; None if neither higher nor lower is better, or with fewer than two means."""
    estimates = [known for group in groups if (known := group.estimate(metric)) is not None]
    if metric.better is None or len(estimates) < 2:
        return None
    choose = max if metric.better == "higher" else min
    return choose(round(known.mean, metric.digits) for known in estimates)
