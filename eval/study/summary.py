"""The results of a study, read back: means over seeds with their 95 % intervals."""

from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pages import interval_text
from sae_lens_sampled.confidence import (
    Interval,
    difference_interval,
    jackknife_interval,
    mean_interval,
    paired_differences,
)
from study.configs import Study
from study.named_text import with_text_of_results
from study.plan import Unit, absorption_units, arms, compared, synthetic_units, units
from study.storage import ResultTable, Storage

FORMATS = {
    "l0": 1,
    "l0_in_training": 1,
    "share_above_0_7": 2,
}
"""Decimals of the metrics that are not shown with three."""


MMCS = "mmcs"
"""The metric that belongs to pairs of SAEs."""


class Summary:
    """Everything that tables and pictures are made from; missing results are left out."""

    def __init__(self, storage: Storage) -> None:
        self.study = storage.study
        self.arms = {arm.name: arm for arm in arms(self.study)}
        self.on_model = _by_arm(storage.evaluations, units(self.study))
        self.absorption = _by_arm(storage.absorption, absorption_units(self.study)) if self.study.absorption else {}
        self.on_synthetic = _by_arm(storage.synthetic, synthetic_units(self.study))
        comparisons = storage.comparisons.load()
        names = [(arm.name, other.name) for arm, other in compared(self.study)]
        self.comparisons = {pair: comparisons[pair] for pair in names if pair in comparisons}

    def values(self, arm: str, metric: str, synthetic: bool = False) -> dict[int, float]:
        """Values by seed of a metric of the evaluation or the pools, or of `variant.metric` of the thresholds."""
        tables = (self.on_synthetic,) if synthetic else (self.on_model, self.absorption)
        results = [of_seed for table in tables for of_seed in table.get(arm, {}).items()]
        values = {seed: value for seed, result in results if (value := _lookup(result, metric)) is not None}
        return dict(sorted(values.items()))

    def mean(self, arm: str, metric: str, synthetic: bool = False) -> Interval | None:
        """Mean over seeds; for "mmcs" over pairs of seeds of the arm, of live latents."""
        if metric == MMCS:
            return self.similarity(arm, arm, "forward", MMCS)
        values = self.values(arm, metric, synthetic)
        return mean_interval(list(values.values())) if values else None

    def difference(self, arm: str, other: str, metric: str, synthetic: bool = False) -> Interval | None:
        """Mean of the differences seed by seed: two arms of one seed share all data and, at one width, initial
        weights.

        For "mmcs" over pairs of seeds of each arm.
        """
        if metric == MMCS:
            of_arm, of_other = (self.similarities(name, name, "forward", MMCS) for name in (arm, other))
            return jackknife_interval(paired_differences(of_arm, of_other))
        return difference_interval(self.values(arm, metric, synthetic), self.values(other, metric, synthetic))

    def similarities(self, arm: str, other: str, *path: str) -> dict[tuple[int, int], float]:
        """Values by pair of seeds of two arms, at `path` in the comparison of a pair."""
        swap = (arm, other) not in self.comparisons
        comparison = self.comparisons.get((other, arm) if swap else (arm, other), {"pairs": []})
        keys = [{"forward": "backward", "backward": "forward"}.get(key, key) if swap else key for key in path]
        values = {tuple(pair["seeds"]): reduce(getitem, keys, pair) for pair in comparison["pairs"]}
        # Dictionaries too large to be matched one to one have none.
        return {} if None in values.values() else values

    def similarity(self, arm: str, other: str, *path: str) -> Interval | None:
        """Mean over pairs of seeds of two arms, of the value at `path` in the comparison of a pair."""
        return jackknife_interval(self.similarities(arm, other, *path))

    def n_evaluated(self, arm: str) -> int:
        """Number of the arm's SAEs that are evaluated."""
        return len(self.on_model.get(arm, {}))

    def number(self, arm: str, metric: str, synthetic: bool = False) -> str:
        """A mean, as text."""
        return shown(self.mean(arm, metric, synthetic), metric)

    def change(self, arm: str, other: str, metric: str, synthetic: bool = False) -> str:
        """A difference, as text with its sign."""
        return shown(self.difference(arm, other, metric, synthetic), metric, signed=True)

    def similar(self, arm: str, other: str, *path: str) -> str:
        """A similarity, as text."""
        return shown(self.similarity(arm, other, *path))

    def label(self, arm: str) -> str:
        """The arm's name on the page."""
        return self.arms[arm].label


def committed(name: str, eval_folder: Path) -> Path:
    """Folder of a study's results in the repository."""
    return eval_folder / "results" / f"study_{name}"


def committed_summary(study: Study, eval_folder: Path) -> Summary:
    """The results in the repository, whatever text they were made with."""
    results = committed(study.name, eval_folder)
    return Summary(Storage(with_text_of_results(study, results), results, Path("study_output")))


def shown(interval: Interval | None, metric: str = "", signed: bool = False) -> str:
    """Format a mean ± half of its 95 % interval, or a difference with the interval's ends; None as "-"."""
    digits = FORMATS.get(metric.split(".")[-1], 3)
    if interval is None or interval.half is None or signed:
        return interval_text(interval, digits, signed)
    return f"{interval.mean:.{digits}f} ± {interval.half:.{digits}f}"


def _by_arm(table: ResultTable, planned: Sequence[Unit]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by arm and seed, in the order of the plan."""
    results = table.load()
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for unit in planned:
        if unit.key in results:
            by_arm.setdefault(unit.arm.name, {})[unit.seed] = results[unit.key]
    return by_arm


def _lookup(result: dict[str, Any], metric: str) -> float | None:
    variant, _, name = metric.rpartition(".")
    if variant:
        return result.get("thresholds", {}).get(variant, {}).get(name)
    return result["metrics"].get(metric, result.get("pools", {}).get(metric))
