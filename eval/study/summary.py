"""The results of a study, read back: means over seeds with their standard errors."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_sampled.saebench.report.metrics import Estimate, estimate
from study.plan import Unit, absorption_units, arms, compared, synthetic_units, units
from study.storage import ResultTable, Storage

FORMATS = {
    "l0": ".1f",
    "l0_in_training": ".1f",
    "share_above_0_7": ".2f",
}
"""Formats of the metrics that are not shown with three decimals."""


class Summary:
    """Everything that tables and pictures are made of; a missing result is left out."""

    def __init__(self, storage: Storage) -> None:
        self.study = storage.study
        self.arms = {arm.name: arm for arm in arms(self.study)}
        self.on_model = _by_arm(storage.evaluations, units(self.study))
        if self.study.absorption:
            for arm, results in _by_arm(storage.absorption, absorption_units(self.study)).items():
                for seed, result in results.items():
                    self.on_model[arm][seed]["metrics"] |= result["metrics"]
        self.on_synthetic = _by_arm(storage.synthetic, synthetic_units(self.study))
        comparisons = storage.comparisons.load()
        names = [(arm.name, other.name) for arm, other in compared(self.study)]
        self.comparisons = {pair: comparisons[pair] for pair in names if pair in comparisons}

    def values(self, arm: str, metric: str, synthetic: bool = False) -> dict[int, float]:
        """Values by seed, of a metric of the evaluation or of the pools, or of `variant.metric` of the thresholds."""
        results = (self.on_synthetic if synthetic else self.on_model).get(arm, {})
        values = {seed: _lookup(result, metric) for seed, result in results.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, arm: str, metric: str, synthetic: bool = False) -> Estimate | None:
        """Mean over seeds."""
        return mean_of(self.values(arm, metric, synthetic))

    def difference(self, arm: str, other: str, metric: str, synthetic: bool = False) -> Estimate | None:
        """Mean of the differences seed by seed: two arms of one seed share weights at the start and all data."""
        return mean_difference(self.values(arm, metric, synthetic), self.values(other, metric, synthetic))

    def similarity(self, arm: str, other: str, *path: str) -> Estimate | None:
        """Mean over pairs of seeds of two arms, of the value at `path` in the comparison of a pair."""
        swap = (arm, other) not in self.comparisons
        comparison = self.comparisons.get((other, arm) if swap else (arm, other))
        if comparison is None or not comparison["pairs"]:
            return None
        keys = [{"forward": "backward", "backward": "forward"}.get(key, key) if swap else key for key in path]
        values = {}
        for pair in comparison["pairs"]:
            value: Any = pair
            for key in keys:
                value = value[key]
            values[tuple(pair["seeds"])] = value
        if None in values.values():  # dictionaries too large to be matched one to one
            return None
        return estimate_over_pairs(values)

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


def mean_of(values: Mapping[Any, float]) -> Estimate | None:
    """Mean of values by SAE; None of none."""
    return estimate(list(values.values())) if values else None


def mean_difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> Estimate | None:
    """Mean of the differences over what both have."""
    return mean_of({key: a[key] - b[key] for key in a if key in b})


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
    squares = sum((mean_without - statistics.fmean(without)) ** 2 for mean_without in without)
    return Estimate(mean, math.sqrt((len(seeds) - 1) / len(seeds) * squares), len(values))


def shown(estimated: Estimate | None, metric: str = "", signed: bool = False) -> str:
    """Mean and standard error as text; a dash if there is nothing, and no error for one seed."""
    if estimated is None:
        return "-"
    spec = FORMATS.get(metric.split(".")[-1], ".3f")
    mean = format(estimated.mean, f"+{spec}" if signed else spec)
    return mean if estimated.error is None else f"{mean} ± {format(estimated.error, spec)}"


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
    return result["metrics"].get(metric, result["pools"].get(metric))
