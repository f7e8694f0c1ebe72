"""Intervals compared with scipy's tests, and Holm's rule with plain loops."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sae_lens_sampled.confidence import (
    cluster_means,
    clustered_interval,
    difference_interval,
    holm,
    jackknife_interval,
    mean_interval,
    paired_differences,
    rank_correlation,
)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(0.3, 0.5, size=(2, 5))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_of_a_mean_is_that_of_a_t_test(values, n, level):
    test = stats.ttest_1samp(values[0, :n], 0)
    interval = mean_interval(list(values[0, :n]), level)
    low, high = test.confidence_interval(level)
    assert [interval.mean, interval.low, interval.high] == pytest.approx([values[0, :n].mean(), low, high])
    assert [interval.error, interval.p] == pytest.approx([stats.sem(values[0, :n]), test.pvalue])
    assert interval.n == n


def test_differences_are_those_of_a_paired_t_test(values):
    a, b = ({(seed, "data"): value for seed, value in enumerate(row)} for row in values)
    test = stats.ttest_rel(*values)
    interval = difference_interval(a, b)
    assert interval is not None
    low, high = test.confidence_interval(0.95)
    assert [interval.low, interval.high, interval.p] == pytest.approx([low, high, test.pvalue])
    swapped = difference_interval(b, a)
    assert swapped is not None
    assert swapped.mean == pytest.approx(-interval.mean)


def test_only_pairs_count():
    a, b = {0: 1.0, 1: 2.0, 2: 4.0}, {1: 1.5, 2: 1.0, 3: 9.0}
    assert paired_differences(a, b) == {1: 0.5, 2: 3.0}
    assert difference_interval(a, {3: 9.0}) is None
    interval = difference_interval({0: 1.0}, {0: 0.25})
    assert interval is not None
    assert (interval.mean, interval.error, interval.low, interval.p, interval.n) == (0.75, None, None, None, 1)


def test_values_that_are_all_equal_have_no_width():
    assert (mean_interval([0.5] * 3).low, mean_interval([0.5] * 3).p) == (0.5, 0)
    assert mean_interval([0.0] * 3).p == 1


def test_clusters_are_what_is_counted(values):
    a, b = (
        {(data, seed): row[seed] + data for data, seed in itertools.product(range(3), range(5)) if seed <= data + 1}
        for row in values
    )
    want = [np.mean([a[key] - b[key] for key in a if key[0] == data]) for data in range(3)]
    interval = difference_interval(a, b, cluster=lambda key: key[0])
    assert interval is not None
    test = stats.ttest_1samp(want, 0)
    assert list(cluster_means(paired_differences(a, b), lambda key: key[0]).values()) == pytest.approx(want)
    assert [interval.mean, interval.p] == pytest.approx([np.mean(want), test.pvalue])
    assert [interval.low, interval.high] == pytest.approx(list(test.confidence_interval(0.95)))
    assert interval.n == 3


def test_seeds_of_two_dictionaries_are_two_values():
    values = {(data, seed): data + 0.01 * seed for data in (0, 1) for seed in range(5)}
    clustered = clustered_interval(values, lambda key: key[0])
    assert clustered is not None
    pooled = mean_interval(list(values.values()))
    assert clustered.mean == pytest.approx(pooled.mean)
    assert clustered.n == 2
    # Means 0.02 and 1.02: a standard error of 0.5, times the t quantile with one degree of freedom.
    assert clustered.high == pytest.approx(0.52 + 12.706 * 0.5, rel=1e-3)
    assert clustered_interval({}, lambda key: key) is None


def holm_by_steps(p_values: list[float], alpha: float) -> set[int]:
    """Indices of the rejected hypotheses: in the order of their p-values, until one is not rejected."""
    rejected, left = set(), list(range(len(p_values)))
    while left:
        best = min(left, key=lambda index: p_values[index])
        if p_values[best] > alpha / len(left):
            break
        rejected.add(best)
        left.remove(best)
    return rejected


def test_adjusted_p_values_reject_what_holms_steps_reject():
    draws = np.random.default_rng(1).uniform(size=(20, 6)) ** 4
    n_rejected = []
    for p_values in draws.tolist():
        adjusted = holm(dict(enumerate(p_values)))
        assert list(adjusted) == list(range(6))
        for alpha in (0.01, 0.05, 0.2):
            rejected = {index for index, p in adjusted.items() if p <= alpha}
            assert rejected == holm_by_steps(p_values, alpha)
            n_rejected.append(len(rejected))
    assert len(set(n_rejected)) > 4
    # 3 x 0.01 and 2 x 0.02; the last is at least the one before it: 0.04, not 0.03.
    assert holm({"b": 0.02, "a": 0.01, "c": 0.03}) == pytest.approx({"b": 0.04, "a": 0.03, "c": 0.04})
    assert holm({}) == {}


def test_the_error_over_pairs_leaves_out_a_unit_with_all_its_pairs():
    # Means without seed 0, 1 and 2: 0.6, 0.2 and 0.1. Error: sqrt((0.09 + 0.01 + 0.04) * 2/3) = 0.3055.
    interval = jackknife_interval({(0, 1): 0.1, (0, 2): 0.2, (1, 2): 0.6})
    assert interval is not None
    assert (interval.mean, interval.error, interval.n) == (pytest.approx(0.3), pytest.approx(0.30551, abs=1e-5), 3)
    assert interval.half == pytest.approx(0.30551 * stats.t.ppf(0.975, 2), abs=1e-4)
    of_two = jackknife_interval({(0, 1): 0.1, (1, 0): 0.3})
    assert of_two is not None
    assert (of_two.mean, of_two.error, of_two.half) == (0.2, None, None)
    without_others = jackknife_interval({("a", "b"): 1.0, ("a", "c"): 2.0})  # leaving out "a" leaves no pair
    assert without_others is not None
    assert (without_others.mean, without_others.error, without_others.n) == (1.5, None, 3)
    assert jackknife_interval({}) is None


@pytest.mark.parametrize("bound", [-0.1, 0.3, 1.0])
def test_a_mean_is_shown_to_be_below_a_bound_by_a_one_sided_t_test(values, bound):
    test = stats.ttest_1samp(values[0], bound, alternative="less")
    assert mean_interval(list(values[0])).p_at_least(bound) == pytest.approx(test.pvalue)
    assert mean_interval([0.3]).p_at_least(bound) is None
    assert mean_interval([0.3, 0.3]).p_at_least(bound) == (bound <= 0.3)


@pytest.mark.parametrize("n", [10, 40])
def test_the_interval_of_a_rank_correlation_contains_the_true_one_as_often_as_it_says(n):
    rng, rho = np.random.default_rng(0), 0.7
    true = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's correlation of normal values that are correlated by rho
    contained = 0
    for _ in range(500):
        x, noise = rng.normal(size=(2, n))
        interval = rank_correlation(x, rho * x + np.sqrt(1 - rho**2) * noise)
        contained += interval.low < true < interval.high
    assert 0.92 < contained / 500 < 0.98


def test_a_rank_correlation_is_scipys_and_has_no_interval_without_four_pairs():
    x, y = np.random.default_rng(1).normal(size=(2, 8))
    test = stats.spearmanr(x, y)
    interval = rank_correlation(x, y)
    assert (interval.mean, interval.p, interval.n) == (pytest.approx(test.statistic), pytest.approx(test.pvalue), 8)
    assert interval.low == pytest.approx(-rank_correlation(x, -y).high)
    assert rank_correlation(x[:3], y[:3]).low is None
    assert rank_correlation(x, np.exp(x)).mean == 1


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"^values \[1.0, nan\] must be finite"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match=r"^a p-value is NaN; leave out"):
        holm({"a": math.nan, "b": 0.03})


def test_the_p_value_of_a_correlation_of_few_pairs_is_that_of_all_orders():
    x, y = [1, 2, 3, 4, 5], [1, 2, 3, 5, 4]
    exact = [abs(stats.spearmanr(x, order).statistic) >= 0.9 - 1e-9 for order in itertools.permutations(y)]
    assert rank_correlation(x, y).p == pytest.approx(sum(exact) / 120) == pytest.approx(10 / 120)
    perfect, constant = rank_correlation(x, x), rank_correlation([1.0] * 5, x)
    assert (perfect.mean, perfect.low, perfect.p) == (pytest.approx(1), None, None)
    assert math.isnan(constant.mean)
    assert constant.p is None
