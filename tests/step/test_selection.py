import oracles
import pytest
import torch
from helpers import config
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sae_lens_sampled.step.scores import SCORES
from sae_lens_sampled.step.selection import (
    ColumnStatistics,
    candidate_pool,
    choose_pool,
    column_statistics,
    count_candidates,
    gumbel_noise,
    keep_top_entries,
    perturb_scores,
)


def select(acts, k, m, score, group_size, draw=None):
    """Both stages, as the training SAE runs them."""
    statistics = column_statistics(acts, score, m, group_size)
    if draw is not None:
        statistics = perturb_scores(statistics, draw[0], torch.tensor(draw[1]))
    pool = candidate_pool(statistics, m)
    return pool, keep_top_entries(acts, pool, int(k * len(acts)), group_size)


def assert_matches_oracle(acts, k, m, score, group_size, draw=None):
    pool, kept = select(acts, k, m, score, group_size, draw)
    rows = acts.tolist()
    want = oracles.pools(rows, score, m, group_size, draw)
    assert [set(group) for group in pool.tolist()] == want
    assert all(group == sorted(group) for group in pool.tolist())
    assert kept[kept != 0].sort().values.tolist() == oracles.kept_values(rows, want, int(k * len(rows)), group_size)
    # Every kept entry is unmoved and in its token's pool.
    assert ((kept == acts) | (kept == 0)).all()
    step = group_size or len(rows)
    assert all(latent in want[token // step] for token, latent in kept.nonzero().tolist())


# Small integers: ties everywhere, dead columns, and sums that are exact in floating point.
matrices = hnp.arrays("float64", st.tuples(st.integers(1, 9), st.integers(2, 8)), elements=st.integers(0, 4))


@settings(max_examples=300, deadline=None)
@given(
    matrix=matrices,
    k=st.floats(0.1, 8),
    share=st.floats(0, 1),
    score=st.sampled_from(["l2_norm", "squared_l2", "frequency"]),
    group_size=st.none() | st.integers(1, 10),
)
def test_selection_matches_plain_loops_with_ties(matrix, k, share, score, group_size):
    m = 1 + round(share * (matrix.shape[1] - 1))
    assert_matches_oracle(torch.from_numpy(matrix), k, m, score, group_size)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(2, 12)),
    seed=st.integers(0, 10**6),
    k=st.floats(0.1, 12),
    share=st.floats(0, 1),
    score=st.sampled_from(["l2_norm", "entropy", "perplexity", "uniform"]),
    group_size=st.none() | st.integers(1, 21),
    draw=st.none() | st.tuples(st.integers(0, 2**40), st.integers(0, 2**33)),
)
def test_selection_matches_plain_loops_on_random_values(shape, seed, k, share, score, group_size, draw):
    # Distinct values, so that rounding decides nothing; with one firing token, many entropies are 0: a true tie.
    acts = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    m = 1 + round(share * (shape[1] - 1))
    if score in ("entropy", "uniform") and draw is None and group_size == 1:
        group_size = None
    assert_matches_oracle(acts, k, m, score, group_size, draw)


@pytest.mark.parametrize(
    ("k", "pool_factor", "d_sae", "size"),
    [
        (4, 1, 100, 4),
        (4, 2.6, 100, 10),
        (2.5, 1, 100, 3),  # at least ceil(k)
        (2.5, 3, 100, 8),
        (0.5, 1, 100, 1),
        (4, 25, 100, 100),
        (4, 24.9, 100, 100),  # 99.6 rounds to all
        (3, 33.333333333333336, 100, 100),
        (4, 1e9, 100, 100),
        (4, 4.9, 20, 20),
    ],
)
def test_the_number_of_candidates(k, pool_factor, d_sae, size):
    assert count_candidates(k, pool_factor, d_sae) == size


def test_equal_scores_go_to_the_larger_norm_then_to_the_lower_index():
    acts = torch.tensor([[1.0, 3, 2, 3, 0, 9], [1, 3, 2, 3, 0, 0]])
    # frequencies 2, 2, 2, 2, 0, 1; the norms order the four equal ones: 1 = 3 > 2 > 0
    assert [select(acts, 1, m, "frequency", None)[0].tolist()[0] for m in (1, 2, 3, 5, 6)] == [
        [1],
        [1, 3],
        [1, 2, 3],
        [0, 1, 2, 3, 5],
        [0, 1, 2, 3, 4, 5],
    ]


def test_dead_latents_fill_a_pool_only_after_every_live_one():
    acts = torch.zeros(4, 6)
    acts[2, 4] = 1e-30  # its square is 0 in float32
    assert select(acts, 1, 2, "squared_l2", None)[0].tolist() == [[0, 4]]
    assert select(acts, 1, 2, "uniform", None, draw=(0, 0))[0].tolist()[0][1] == 4


def test_gradient_reaches_kept_entries_only():
    acts = torch.rand(8, 10, dtype=torch.float64, requires_grad=True)
    pool, kept = select(acts, 2, 5, "l2_norm", 4)
    weight = torch.rand(8, 10, dtype=torch.float64)
    (kept * weight).sum().backward()
    torch.testing.assert_close(acts.grad, weight * (kept > 0), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda a: keep_top_entries(a, pool, 16, 4), acts)


def test_half_precision_activations_are_scored_in_float32():
    # bfloat16 has steps of 2 between 256 and 512.
    acts = torch.zeros(600, 2, dtype=torch.bfloat16)
    acts[:323, 0], acts[:321, 1] = 1, 1
    assert column_statistics(acts, "squared_l2", 1, None).scores.tolist() == [[323, 321]]


def test_gumbel_noise_matches_whole_number_arithmetic():
    noise = gumbel_noise(2**35 + 7, torch.tensor(2**31 + 3), 3, 5)
    want = [[oracles.gumbel(2**35 + 7, 2**31 + 3, group, latent) for latent in range(5)] for group in range(3)]
    torch.testing.assert_close(noise, torch.tensor(want, dtype=torch.float64))


def test_gumbel_noise_has_the_gumbel_distribution_along_every_axis():
    from scipy.stats import gumbel_r, kstest

    over_latents = gumbel_noise(0, torch.tensor(0), 1, 20000).flatten()
    over_draws = torch.cat([gumbel_noise(0, torch.tensor(draw), 1, 1).flatten() for draw in range(3000)])
    over_groups = gumbel_noise(1, torch.tensor(5), 3000, 1).flatten()
    over_seeds = torch.cat([gumbel_noise(seed, torch.tensor(0), 1, 1).flatten() for seed in range(3000)])
    for noise in (over_latents, over_draws, over_groups, over_seeds):
        assert kstest(noise.numpy(), gumbel_r.cdf).pvalue > 0.01
    lagged = torch.corrcoef(torch.stack([over_latents[:-1], over_latents[1:]]))[0, 1]
    assert abs(lagged) < 0.03


def test_sampled_pools_choose_in_proportion_to_the_score():
    acts = torch.diag(torch.tensor([1.0, 2, 3, 4, 0]))
    statistics = column_statistics(acts, "l2_norm", 1, None)
    draws = torch.cat([candidate_pool(perturb_scores(statistics, 3, torch.tensor(i)), 1) for i in range(4000)])
    share = draws.flatten().bincount(minlength=5) / 4000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4, 0]), atol=0.025, rtol=0)


def test_sampled_pools_differ_between_groups_steps_and_seeds():
    acts = torch.ones(40, 64)
    pools = {
        (seed, draw): select(acts, 1, 8, "uniform", 10, draw=(seed, draw))[0].tolist()
        for seed in (0, 1)
        for draw in (0, 1)
    }
    chosen = [tuple(group) for groups in pools.values() for group in groups]
    assert len(set(chosen)) == len(chosen)


def test_l2_norm_and_squared_l2_choose_the_same_pool_unless_it_is_sampled():
    acts = torch.rand(30, 64).pow(4)
    assert torch.equal(select(acts, 1, 9, "l2_norm", 7)[0], select(acts, 1, 9, "squared_l2", 7)[0])
    assert not torch.equal(
        select(acts, 1, 9, "l2_norm", 7, draw=(0, 0))[0], select(acts, 1, 9, "squared_l2", 7, draw=(0, 0))[0]
    )


@pytest.mark.parametrize("score", sorted(SCORES.keys() - {"uniform"}))
def test_scores_are_not_rounded_to_bfloat16_by_autocast(score):
    acts = torch.rand(20, 9, generator=torch.Generator().manual_seed(0))
    want = column_statistics(acts, score, 4, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = column_statistics(acts, score, 4, None)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-6, atol=0)
    exact = column_statistics(acts.double(), score, 4, None)
    torch.testing.assert_close(got.scores.double(), exact.scores, rtol=1e-4, atol=0)


def test_a_score_that_is_nan_ranks_last():
    scores = torch.tensor([[3.0, torch.nan, 5.0, 4.0, torch.nan, 1.0]])
    alive = torch.ones(1, 6, dtype=torch.bool)
    for n_candidates, want in ((2, [2, 3]), (4, [0, 2, 3, 5])):
        assert candidate_pool(ColumnStatistics(scores, scores, alive), n_candidates)[0].tolist() == want
    assert candidate_pool(ColumnStatistics(scores, scores, alive), 5)[0].unique().numel() == 5


def test_the_scores_of_sampled_pools_alone_are_perturbed():
    acts = torch.rand(20, 40)
    for sampling, score in (("top", "l2_norm"), ("proportional", "squared_l2")):
        cfg = config(pool_sampling=sampling, score=score, pool_seed=5)
        statistics = column_statistics(acts, score, cfg.n_candidates, None)
        for draw in map(torch.tensor, range(2)):
            scored = statistics if sampling == "top" else perturb_scores(statistics, 5, draw)
            assert torch.equal(choose_pool(statistics, cfg, draw), candidate_pool(scored, cfg.n_candidates))
