"""Means with confidence intervals, for a few values that may be dependent.

Each value belongs to an SAE. Two SAEs of different arms that started from the same weights and saw the same samples are
a pair: the difference between their arms is the mean of the differences within pairs. SAEs that were trained on the
same data (one dictionary of features, or the samples of one seed) are not independent repeats: they form a cluster,
and clusters are counted, not SAEs. Intervals of means use Student's t quantiles, which make them more than twice as
wide for three values as normal quantiles would.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, TypeVar

from scipy import stats

Key = TypeVar("Key", bound=Hashable)
EXACT_PAIRS = 7
"""Largest number of pairs for which all permutations are counted; 5,040 here, then ever more."""


@dataclass(frozen=True)
class Interval:
    """A mean or correlation and its uncertainty; None where that cannot be estimated."""

    mean: float
    error: float | None
    """Standard error of a mean: std / sqrt(n) with ddof=1, or that of the jackknife."""
    low: float | None
    """Lower end of the confidence interval."""
    high: float | None
    """Upper end."""
    p: float | None
    """Two-sided p-value of the null hypothesis that the mean or correlation is 0."""
    n: int
    """Number of independent values."""

    @property
    def half(self) -> float | None:
        """Half of the width of a mean's confidence interval; for a correlation, only its part above the estimate."""
        return None if self.high is None else self.high - self.mean

    def p_at_least(self, bound: float) -> float | None:
        """One-sided p-value of the null hypothesis that the mean is at least `bound`; small if the mean is below."""
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.mean >= bound)
        return float(stats.t.cdf((self.mean - bound) / self.error, self.n - 1))


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent values, at least one, with the interval of a t-test.

    Raises:
        ValueError: if a value is not finite.
    """
    n = len(values)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"values {list(values)} must be finite, or have no mean with an interval.")
    return _t_interval(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None, n, level)


def _t_interval(mean: float, error: float | None, n: int, level: float) -> Interval:
    """The interval with n - 1 degrees of freedom."""
    if error is None:
        return Interval(mean, None, None, None, None, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p = float(mean == 0) if error == 0 else float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Interval(mean, error, mean - half, mean + half, p, n)


def paired_differences(a: Mapping[Key, float], b: Mapping[Key, float]) -> dict[Key, float]:
    """Differences `a - b` within pairs, for the keys that both have."""
    return {key: a[key] - b[key] for key in a if key in b}


def cluster_means(values: Mapping[Key, float], cluster: Callable[[Key], Hashable]) -> dict[Hashable, float]:
    """Mean of each cluster's values; `cluster` maps a key to its cluster."""
    members: dict[Hashable, list[float]] = {}
    for key, value in values.items():
        members.setdefault(cluster(key), []).append(value)
    return {name: statistics.fmean(of_cluster) for name, of_cluster in members.items()}


def clustered_interval(
    values: Mapping[Key, float], cluster: Callable[[Key], Hashable], level: float = 0.95
) -> Interval | None:
    """Mean of the cluster means, with the interval of a t-test over clusters; None without values.

    All clusters have the same weight, whatever their size. Two clusters give a valid but very wide interval: the t
    quantile of the 95% interval is 12.7.
    """
    means = cluster_means(values, cluster)
    return mean_interval(list(means.values()), level) if means else None


def difference_interval(
    a: Mapping[Key, float],
    b: Mapping[Key, float],
    cluster: Callable[[Key], Hashable] = lambda key: key,
    level: float = 0.95,
) -> Interval | None:
    """Mean of the differences within pairs; None without pairs. By default every pair is a cluster of its own."""
    return clustered_interval(paired_differences(a, b), cluster, level)


def jackknife_interval(values: Mapping[tuple[Key, Key], float], level: float = 0.95) -> Interval | None:
    """Mean over pairs of units, such as pairs of seeds; None without pairs. It has no error below
    three units, or if one unit is in every pair.

    Pairs share units, so their spread understates the error. The jackknife leaves out each unit in turn, with all of
    its pairs (for means over pairs: Efron and Stein 1981, "The jackknife estimate of variance"). `n` is the number of
    units.
    """
    if not values:
        return None
    units = {unit for pair in values for unit in pair}
    mean, n = statistics.fmean(values.values()), len(units)
    if n < 3 or any(all(unit in pair for pair in values) for unit in units):  # without such a unit no pair is left
        return _t_interval(mean, None, n, level)
    without = [statistics.fmean(value for pair, value in values.items() if unit not in pair) for unit in units]
    squares = sum((mean_without - statistics.fmean(without)) ** 2 for mean_without in without)
    return _t_interval(mean, math.sqrt((n - 1) / n * squares), n, level)


def rank_correlation(x: Sequence[float], y: Sequence[float], level: float = 0.95) -> Interval:
    """Spearman's rank correlation of pairs of values, with the interval of Bonett and Wright 2000 from four pairs on.

    A correlation of 1 or -1 has no interval, nor has NaN, the correlation with a constant. The standard error holds on
    the scale of Fisher's z, so `error` is None. The p-value is exact up to `EXACT_PAIRS` pairs.
    """
    n = len(x)
    if min(len(set(x)), len(set(y))) < 2:
        return Interval(math.nan, None, None, None, None, n)
    found: Any = stats.spearmanr(x, y)
    r = float(found.statistic)
    if n < 4 or abs(r) > 1 - 1e-12:  # up to rounding
        return Interval(r, None, None, None, None, n)
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt((1 + r**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(r) + sign * half) for sign in (-1, 1))
    return Interval(r, None, low, high, _permutation_p(x, y) if n <= EXACT_PAIRS else float(found.pvalue), n)


def _permutation_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Share of all orders of `y` whose rank correlation with `x` is at least as far from 0."""
    ranks_x, ranks_y = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    products = [abs(sum(a * b for a, b in zip(ranks_x, order, strict=True))) for order in permutations(ranks_y)]
    return sum(product >= products[0] - 1e-9 for product in products) / len(products)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm-adjusted p-values of many comparisons, in the order of `p_values` (Holm 1979).

    Comparisons with adjusted values of at most 0.05 are jointly significant: the chance that any of them is a false
    positive is at most 0.05, however the comparisons depend on each other.

    Raises:
        ValueError: if a p-value is NaN.
    """
    if any(map(math.isnan, p_values.values())):
        raise ValueError("a p-value is NaN; leave out comparisons that could not be made.")
    adjusted, largest = {}, 0.0
    for n_smaller, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min((len(p_values) - n_smaller) * p_values[key], 1.0))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}
