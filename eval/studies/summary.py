"""The results of a study, read back: means over seeds with their standard errors."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sae_lens_sampled.saebench.report.metrics import Estimate, estimate
from studies.plan import Arm, arms, compared, synthetic_units, units
from studies.storage import Storage

FORMATS = {
    "l0": ".1f",
    "l0_in_training": ".1f",
    "absorption_letters": ".0f",
    "pool_size": ".0f",
    "share_above_0_7": ".2f",
}
"""Of the metrics that are not shown with three decimals."""


class Summary:
    """Everything that tables and pictures are made of; a missing result is left out."""

    def __init__(self, storage: Storage) -> None:
        self.study = storage.study
        self.arms = {arm.name: arm for arm in arms(self.study)}
        self.on_model = self._by_arm(storage, units(self.study), storage.on_model)
        self.on_synthetic = self._by_arm(storage, synthetic_units(self.study), storage.on_synthetic)
        self.comparisons: dict[tuple[str, str], dict[str, Any]] = {}
        for a, b in compared(self.study):
            if storage.is_done(storage.comparison(a, b)):
                self.comparisons[a.name, b.name] = storage.load(storage.comparison(a, b))

    @staticmethod
    def _by_arm(storage: Storage, some: Sequence, path: Any) -> dict[str, dict[int, dict[str, Any]]]:
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for unit in some:
            if storage.is_done(path(unit)):
                found.setdefault(unit.arm.name, {})[unit.seed] = storage.load(path(unit))
        return found

    def values(self, arm: str, metric: str, synthetic: bool = False) -> dict[int, float]:
        """By seed; of a metric of the evaluation, of the pools, or `variant.metric` of the thresholds."""
        results = (self.on_synthetic if synthetic else self.on_model).get(arm, {})
        return {seed: value for seed, one in results.items() if (value := _lookup(one, metric)) is not None}

    def mean(self, arm: str, metric: str, synthetic: bool = False) -> Estimate | None:
        values = list(self.values(arm, metric, synthetic).values())
        return estimate(values) if values else None

    def difference(self, arm: str, other: str, metric: str, synthetic: bool = False) -> Estimate | None:
        """Mean of the differences seed by seed: two arms of one seed share weights at the start and all data."""
        a, b = self.values(arm, metric, synthetic), self.values(other, metric, synthetic)
        both = [a[seed] - b[seed] for seed in a if seed in b]
        return estimate(both) if both else None

    def similarity(self, a: str, b: str, *path: str) -> Estimate | None:
        """Of two arms, over pairs of seeds."""
        found = self.comparisons.get((a, b)) or self.comparisons.get((b, a))
        if found is None or not found["pairs"]:
            return None
        swap = (a, b) not in self.comparisons
        keys = [{"forward": "backward", "backward": "forward"}.get(key, key) if swap else key for key in path]
        values = {}
        for pair in found["pairs"]:
            value: Any = pair
            for key in keys:
                value = value[key]
            values[tuple(pair["seeds"])] = value
        if None in values.values():  # dictionaries too large to be matched one to one
            return None
        return estimate_over_pairs(values)

    def label(self, arm: str | Arm) -> str:
        return self.arms[arm].label if isinstance(arm, str) else arm.label


def estimate_over_pairs(values: dict[tuple[int, int], float]) -> Estimate:
    """Mean over pairs of seeds, with its jackknife error; no error below three seeds.

    Pairs share SAEs, so that their spread says too little. The jackknife leaves out a seed with all of its pairs (for
    means over pairs: Efron and Stein 1981, "The jackknife estimate of variance").
    """
    mean = statistics.fmean(values.values())
    seeds = {seed for pair in values for seed in pair}
    if len(seeds) < 3:
        return Estimate(mean, None, len(values))
    without = [statistics.fmean(value for pair, value in values.items() if seed not in pair) for seed in seeds]
    squares = sum((one - statistics.fmean(without)) ** 2 for one in without)
    return Estimate(mean, math.sqrt((len(seeds) - 1) / len(seeds) * squares), len(values))


def shown(found: Estimate | None, metric: str = "", signed: bool = False) -> str:
    """Mean and standard error; a dash if there is nothing, and no error for one seed."""
    if found is None:
        return "-"
    spec = FORMATS.get(metric.split(".")[-1], ".3f")
    mean = format(found.mean, f"+{spec}" if signed else spec)
    return mean if found.error is None else f"{mean} ± {format(found.error, spec)}"


def _lookup(result: dict[str, Any], metric: str) -> float | None:
    variant, _, name = metric.rpartition(".")
    if variant:
        return result.get("thresholds", {}).get(variant, {}).get(name)
    return result["metrics"].get(metric, result["pools"].get(metric))
