import math

import oracles
import pytest
import torch

from sae_lens_sampled import SCORES, SampledTopKTrainingSAEConfig, register_score
from sae_lens_sampled.step.scores import (
    LEVERAGE_ROWS,
    column_sums,
    entropy,
    frequency,
    goes_by_columns,
    l2_norm,
    perplexity,
    ridge_leverage,
    squared_l2,
)
from sae_lens_sampled.step.selection import column_statistics

BUILT_IN = tuple(SCORES)  # before tests of the benchmark's variants register theirs in the same process
COLUMNWISE = [name for name in BUILT_IN if name != "ridge_leverage"]


def random_acts(*shape, dtype=torch.float64):
    """Non-negative activations, half of them zeros, with a dead column in the middle."""
    acts = (torch.randn(*shape, dtype=torch.float64) * 3).relu()
    acts[..., shape[-1] // 2] = 0
    return acts.to(dtype)


@pytest.mark.parametrize("n_tokens", [1, 2, 13])
@pytest.mark.parametrize("name", COLUMNWISE)
def test_score_matches_plain_loops(name, n_tokens):
    acts = random_acts(n_tokens, 9)
    want = [oracles.score(name, column) for column in acts.T.tolist()]
    torch.testing.assert_close(SCORES[name](acts, 3), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("name", BUILT_IN)
def test_score_of_groups_is_the_score_of_each(name):
    acts = random_acts(4, 7, 11, dtype=torch.float32)
    want = torch.stack([SCORES[name](group, 5) for group in acts])
    torch.testing.assert_close(SCORES[name](acts, 5), want)


@pytest.mark.parametrize("name", COLUMNWISE)
def test_score_of_a_chunk_of_columns_is_a_chunk_of_the_scores(name):
    acts = random_acts(17, 10, dtype=torch.float32)
    torch.testing.assert_close(SCORES[name](acts[:, 3:8], 4), SCORES[name](acts, 4)[3:8])


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_scores_are_finite_at_any_scale(name, scale):
    assert SCORES[name](random_acts(30, 12, dtype=torch.float32) * scale, 4).isfinite().all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_scores_of_a_batch_in_which_nothing_fires_are_zero(name):
    assert SCORES[name](torch.zeros(6, 4), 2).tolist() == [0, 0, 0, 0]


def test_squaring_keeps_the_order_of_l2_norm():
    acts = random_acts(20, 50)
    assert l2_norm(acts, 1).argsort().tolist() == squared_l2(acts, 1).argsort().tolist()


def test_l2_norm_prefers_the_rare_spike_and_perplexity_and_frequency_the_consistent_latent():
    """The paper's summary says L2 ranks "10 on 50 %" above "100 on 5 %" of tokens. It is the other way round."""
    acts = torch.zeros(100, 2)
    acts[:50, 0], acts[:5, 1] = 10.0, 100.0
    consistent, spiking = (l2_norm(acts, 1) / math.sqrt(100)).tolist()
    assert (round(consistent, 1), round(spiking, 1)) == (7.1, 22.4)
    torch.testing.assert_close(perplexity(acts, 1), torch.tensor([50.0, 5.0]))
    assert frequency(acts, 1).tolist() == [50, 5]
    assert entropy(acts, 1)[0] < entropy(acts, 1)[1]


@pytest.mark.parametrize("n_candidates", [1, 3, 8])
def test_ridge_leverage_matches_its_definition(n_candidates):
    acts = random_acts(10, 8)
    ridge = acts.square().sum() / n_candidates
    inverse = torch.linalg.inv(acts @ acts.T + ridge * torch.eye(10, dtype=acts.dtype))
    want = torch.stack([column @ inverse @ column for column in acts.T])
    torch.testing.assert_close(ridge_leverage(acts, n_candidates), want)


def test_ridge_leverage_sees_evenly_strided_rows_from_the_first_to_the_last():
    n_tokens = 3 * (LEVERAGE_ROWS - 1) + 1
    acts = random_acts(n_tokens, 6)
    between = acts.clone()
    between[1::3] = 77.0
    torch.testing.assert_close(ridge_leverage(between, 2), ridge_leverage(acts, 2))
    assert not torch.allclose(
        ridge_leverage(acts * torch.linspace(1, 9, n_tokens)[:, None], 2), ridge_leverage(acts, 2)
    )


def test_ridge_leverage_prefers_a_latent_that_no_other_can_replace():
    acts = torch.zeros(12, 4)
    acts[:6, :3] = 1.0  # three copies of one pattern
    acts[6:, 3] = 1.0
    # ridge 24 / 2 = 12; the three copies share one eigenvalue, 18, and the fourth latent has its own, 6
    want = [6 / (18 + 12)] * 3 + [6 / (6 + 12)]
    torch.testing.assert_close(ridge_leverage(acts, 2), torch.tensor(want))


@pytest.fixture
def registered(request):
    """A score name that is unregistered after the test."""
    yield "mine"
    SCORES.pop("mine", None)


def test_registered_score_chooses_the_pool(registered):
    from helpers import activations, sampled_sae, step_input

    register_score(registered, lambda acts, n_candidates: -acts.sum(dim=-2) + 0 * n_candidates)
    sae = sampled_sae(score=registered)
    output = sae.training_forward_pass(step_input(activations(50)))
    sums = output.hidden_pre.relu().sum(dim=0)
    alive = sums > 0
    worst = sums.masked_fill(~alive, torch.inf).topk(sae.cfg.n_candidates, largest=False).indices
    assert sorted(worst.tolist()) == sae.pool_record.pool.nonzero().flatten().tolist()


def test_registering_a_name_twice_is_refused():
    with pytest.raises(ValueError, match=r"score 'entropy' is already registered; choose another name"):
        register_score("entropy", lambda acts, n_candidates: acts.sum(-2))


def test_score_of_the_wrong_shape_is_refused(registered):
    register_score(registered, lambda acts, n_candidates: acts.sum())
    with pytest.raises(
        ValueError, match=r"'mine' returned shape \(\) for activations of shape \(5, 4\).*return \(4,\)"
    ):
        SCORES[registered](torch.rand(5, 4), 2)


@pytest.mark.parametrize("score", [lambda acts: (acts > 0).sum(-2), lambda acts: (acts > 0).any(-2)])
def test_scores_may_be_counts_or_masks(registered, score):
    register_score(registered, lambda acts, n_candidates: score(acts), by_columns=True)
    acts = torch.rand(5, 4) - 0.5
    torch.testing.assert_close(SCORES[registered](acts, 2), score(acts).float())  # of this type too


def test_score_that_returns_nan_is_refused(registered):
    register_score(registered, lambda acts, n_candidates: acts.sum(-2) / acts.sum(-2))
    acts = torch.rand(5, 4)
    acts[:, 1] = 0
    with pytest.raises(ValueError, match=r"score 'mine' returned NaN 1 times"):
        SCORES[registered](acts, 2)


def test_unknown_score_lists_the_known_ones(registered):
    with pytest.raises(ValueError, match=r"score='l2' must be one of l2_norm, squared_l2.*register_score"):
        SampledTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2, score="l2")


def test_scores_are_as_precise_as_their_activations():
    acts = random_acts(13, 9)
    want = [oracles.score("entropy", column) for column in acts.T.tolist()]
    torch.testing.assert_close(entropy(acts, 3), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BUILT_IN)
def test_scores_have_the_shape_of_the_groups_and_the_type_of_the_activations(name):
    for shape in ((1, 5), (2, 1, 5), (2, 3, 1, 5), (2, 3, 4, 5)):
        got = SCORES[name](random_acts(*shape, dtype=torch.float32), 3)
        assert (got.shape, got.dtype) == ((*shape[:-2], 5), torch.float32)


def test_the_built_in_scores_that_judge_each_latent_by_itself():
    assert set(COLUMNWISE) == set(filter(goes_by_columns, BUILT_IN))


@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("last_cutoff", [None, 0.0, 0.4])
def test_a_winsorised_score_counts_nothing_above_the_last_cutoff(group_size, last_cutoff):
    acts = random_acts(16, 9, dtype=torch.float32)  # the last group is shorter
    given, cutoff = None if last_cutoff is None else torch.tensor(last_cutoff), last_cutoff or math.inf
    got = column_statistics(acts, "winsorised", 4, group_size, given)
    groups = [group.T.tolist() for group in acts.split(group_size or len(acts))]
    want, plain = (
        torch.tensor([[oracles.score("winsorised", column, most) for column in group] for group in groups])
        for most in (cutoff, math.inf)
    )
    torch.testing.assert_close(got.scores, want)
    assert (want < plain).any() == (cutoff == 0.4)


@pytest.mark.parametrize("score", ["l2_norm", "entropy"])
def test_sums_over_one_token_outlive_the_activations(score):
    acts = torch.tensor([[[1.0, 0.0, 3.0]]])
    sums = column_sums(acts, score)
    acts.zero_()
    assert sums.peak.tolist() == [[1, 0, 3]]
    assert sums.sums[0].tolist() == [[1, 0, 9]]
