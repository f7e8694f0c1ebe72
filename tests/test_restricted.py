"""The pool-restricted step gives the numbers of the dense path, its plain reference."""

import copy

import oracles
import pytest
import torch
from helpers import D_IN, activations, gradients, step_input
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig

import sae_lens_sampled.auxiliary
import sae_lens_sampled.restricted
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, register_score
from sae_lens_sampled.auxiliary import dead_reconstruction, random_rows
from sae_lens_sampled.restricted import scan_columns
from sae_lens_sampled.scores import BY_COLUMNS, SCORES
from sae_lens_sampled.selection import column_statistics

variants = pytest.mark.parametrize(
    "fields",
    [
        {},
        {"k": 2.6},
        {"score": "entropy"},
        {"score": "frequency", "rescale_acts_by_decoder_norm": False},
        {"score": "ridge_leverage"},
        {"score": "perplexity", "pool_sampling": "proportional"},
        {"score": "uniform", "pool_sampling": "proportional", "pool_group_size": 16},
        {"pool_group_size": 16},
        {"pool_group_size": 21, "score": "squared_l2"},
        {"pool_group_size": 16, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": True},
    ],
    ids=str,
)


def an_sae(**fields):
    sae = SampledTopKTrainingSAE(
        SampledTopKTrainingSAEConfig(**{"d_in": D_IN, "d_sae": 200, "k": 3, "pool_factor": 5, **fields})
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.02)
    return sae


def step(sae, x, n_dead=0, number=0):
    given = step_input(x, step=number)
    given.dead_neuron_mask = torch.zeros(200, dtype=torch.bool)
    given.dead_neuron_mask[60 : 60 + n_dead] = True
    return sae.training_forward_pass(given)


@pytest.fixture
def both_paths(monkeypatch):
    """Runs the same thing on the restricted and on the dense path, from equal SAEs."""

    def run(sae, function):
        results = []
        for sparse in (True, False):
            monkeypatch.setattr(SampledTopKTrainingSAE, "_restricts", lambda sae, answer=sparse: answer)
            one = copy.deepcopy(sae)
            output = function(one)
            assert output.feature_acts.is_sparse == sparse
            results.append((one, output))
        return results

    return run


def assert_equal_steps(restricted, dense):
    (mine, got), (theirs, want) = restricted, dense
    assert got.feature_acts.shape == want.feature_acts.shape
    torch.testing.assert_close(got.feature_acts.to_dense(), want.feature_acts.detach())
    torch.testing.assert_close(got.sae_out, want.sae_out)
    torch.testing.assert_close(got.losses, want.losses)
    mine_gradients, their_gradients = gradients(mine, got), gradients(theirs, want)
    for name, gradient in mine_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], msg=name)
    for name, buffer in mine.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], msg=name)


@pytest.mark.parametrize("n_dead", [0, 4, 100])
@variants
def test_three_steps_leave_everything_as_the_dense_path_does(both_paths, fields, n_dead):
    def steps(sae):
        for number in range(2):
            step(sae, activations(70, seed=number), n_dead, number)
        return step(sae, activations(70, seed=9), n_dead, 2)

    assert_equal_steps(*both_paths(an_sae(**fields), steps))


@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, {"k": 0.01}], ids=str)
def test_too_few_positive_entries_are_counted_as_on_the_dense_path(both_paths, fields):
    sae = an_sae(**fields)
    sae.b_enc.data -= 6  # at most half of what may be kept
    mine, theirs = both_paths(sae, lambda one: step(one, activations(70, seed=3)))
    assert_equal_steps(mine, theirs)
    n_kept = int((mine[1].feature_acts.to_dense() > 0).sum())
    assert n_kept < max(1, sae.cfg.k * 70)


def test_feature_acts_are_coalesced_as_they_say():
    indices = step(an_sae(), activations(7, 10)).feature_acts.indices()
    flat = (indices[0] * 10 + indices[1]) * 200 + indices[2]
    assert (flat.diff() > 0).all()


def test_silent_latents_have_a_peak_of_zero(both_paths):
    sae = an_sae()
    sae.b_enc.data[7] = -1e3
    for one, _ in both_paths(sae, lambda one: step(one, activations(70, seed=3))):
        assert one.rate_matcher.peak[7] == 0


@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, {"score": "ridge_leverage"}], ids=str)
def test_broken_weights_end_in_a_loss_that_is_nan(fields):
    sae = an_sae(**fields)
    sae.W_enc.data.fill_(torch.nan)
    assert step(sae, activations(70)).loss.isnan()


@pytest.mark.parametrize("shape", [(70,), (7, 10), (2, 5, 7)], ids=str)
def test_leading_dimensions_stay(both_paths, shape):
    sae = an_sae(pool_group_size=16)
    assert_equal_steps(*both_paths(sae, lambda one: step(one, activations(*shape, seed=3))))


def test_heads_are_merged_as_saelens_merges_them(both_paths):
    sae = an_sae()
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"

    def heads(one):
        one.turn_on_forward_pass_hook_z_reshaping()
        return step(one, activations(70, seed=3).view(70, 3, D_IN // 3), 30)

    mine, theirs = both_paths(sae, heads)
    assert mine[1].sae_out.shape == (70, 3, D_IN // 3)
    assert_equal_steps(mine, theirs)


def test_double_precision(both_paths):
    sae = an_sae(dtype="float64")
    assert_equal_steps(*both_paths(sae, lambda one: step(one, activations(70).double(), 90)))


def test_autocast_keeps_scores_and_thresholds_in_float32(both_paths):
    def under_autocast(sae):
        with torch.autocast("cpu", torch.bfloat16):
            return step(sae, activations(70), 90)

    (mine, got), (theirs, want) = both_paths(an_sae(), under_autocast)
    torch.testing.assert_close(got.feature_acts.to_dense(), want.feature_acts.detach())
    torch.testing.assert_close(got.losses, want.losses, rtol=0.02, atol=1e-4)
    mine_gradients, their_gradients = gradients(mine, got), gradients(theirs, want)
    for name, gradient in mine_gradients.items():
        similarity = torch.cosine_similarity(gradient.flatten(), their_gradients[name].flatten(), dim=0)
        assert similarity > 0.999, name
    assert mine.latent_threshold.dtype == torch.float32
    torch.testing.assert_close(mine.latent_threshold, theirs.latent_threshold)


@pytest.mark.parametrize("n_bytes", [1, 64 * 70 * 4, 100 * 70 * 4, 2**30])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("score", sorted(BY_COLUMNS))
def test_the_scan_sees_what_the_whole_matrix_shows_whatever_the_chunk(monkeypatch, score, group_size, n_bytes):
    monkeypatch.setitem(sae_lens_sampled.restricted.CHUNK_BYTES, "cpu", n_bytes)
    sae, x = an_sae(), activations(70)
    norms, threshold = sae.W_dec.norm(dim=1), torch.linspace(0, 3, 200)
    scan = scan_columns(x, sae.W_enc, sae.b_enc, norms, threshold, score, 15, group_size)
    hidden_pre = ((x @ sae.W_enc + sae.b_enc) * norms).detach()
    want = column_statistics(hidden_pre.relu(), score, 15, group_size)
    for got, one in zip(scan.statistics, want, strict=True):
        torch.testing.assert_close(got, one)
    near = ((hidden_pre - threshold).abs() < 1e-5).sum(dim=0)
    assert ((scan.n_fired - (hidden_pre > threshold).sum(dim=0)).abs() <= near).all()
    torch.testing.assert_close(scan.peak, hidden_pre.amax(dim=0).relu())


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("n_dead", [5, 30])
def test_dead_latents_reconstruct_as_in_plain_loops(monkeypatch, n_dead, rescale):
    monkeypatch.setitem(sae_lens_sampled.auxiliary.ROW_CHUNK_BYTES, "cpu", 1)
    sae, x, k_aux = an_sae(), activations(50), 6
    weights = sae.W_enc[:, :n_dead], sae.b_enc[:n_dead], sae.W_dec[:n_dead]
    norms = weights[2].norm(dim=1).detach() if rescale else None
    got = dead_reconstruction(x, *weights, norms, k_aux)
    hidden_pre = (x @ weights[0] + weights[1]).tolist()
    scale = norms.tolist() if rescale else [1.0] * n_dead
    for row, values in zip(got.tolist(), hidden_pre, strict=True):
        chosen = sorted(range(n_dead), key=lambda j: -values[j] * scale[j])[:k_aux]
        want = [sum(values[j] * weights[2][j, i].item() for j in chosen) for i in range(D_IN)]
        assert row == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("n_bytes", [1, 2**20])
def test_gradients_of_the_dead_reconstruction_are_those_of_differences(monkeypatch, n_bytes):
    monkeypatch.setitem(sae_lens_sampled.auxiliary.ROW_CHUNK_BYTES, "cpu", n_bytes)
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 5), (5, 9), (9,), (9, 5)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True) for shape in shapes]
    norms = torch.rand(9, generator=generator, dtype=torch.double) + 0.5
    assert torch.autograd.gradcheck(lambda *some: dead_reconstruction(*some, norms, 4), inputs)


@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, {"apply_b_dec_to_input": True}], ids=str)
def test_gradients_of_a_step_are_those_of_differences(monkeypatch, fields):
    monkeypatch.setattr(SampledTopKTrainingSAE, "_restricts", lambda sae: True)
    sae = an_sae(dtype="float64", **fields)
    x = activations(40).double()
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    loss = step(copy.deepcopy(sae), x, 30)
    sae_gradients = gradients(sae, step(sae, x, 30))
    assert loss.feature_acts.is_sparse
    generator = torch.Generator().manual_seed(0)
    for name in names:
        direction = torch.randn(getattr(sae, name).shape, generator=generator, dtype=torch.double)
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(an_sae(dtype="float64", **fields))
            getattr(moved, name).data += sign * 1e-6 * direction
            output = step(moved, x, 30)
            # Of the auxiliary loss what it reconstructs is no function of the weights: its target is detached.
            losses.append(output.losses["mse_loss"])
        slope = (losses[0] - losses[1]).item() / 2e-6
        clean = copy.deepcopy(an_sae(dtype="float64", **fields))
        clean.cfg.aux_loss_coefficient = 0
        want = (gradients(clean, step(clean, x, 0))[name] * direction).sum().item()
        assert slope == pytest.approx(want, rel=1e-4), name
        assert sae_gradients[name].isfinite().all()


def test_a_share_of_the_tokens_gives_the_mean_over_all_in_expectation():
    sae = an_sae(aux_token_fraction=0.25)
    x, n_draws = activations(80), 600
    whole = an_sae()
    want = step(whole, x, 100).losses["auxiliary_reconstruction_loss"].item()
    losses = []
    for number in range(n_draws):
        one = copy.deepcopy(sae)
        one.pool_record.n_steps += number
        losses.append(step(one, x, 100).losses["auxiliary_reconstruction_loss"].item())
    losses = torch.tensor(losses, dtype=torch.double)
    assert losses.std() > 0
    assert abs(losses.mean() - want) < 4 * losses.std() / n_draws**0.5


def test_a_share_of_the_tokens_is_the_same_on_both_paths(both_paths):
    sae = an_sae(aux_token_fraction=0.3)
    assert_equal_steps(*both_paths(sae, lambda one: step(one, activations(70), 100)))


def test_random_rows_are_that_many_and_different():
    noise = torch.rand(50, generator=torch.Generator().manual_seed(0))
    rows = random_rows(noise, 0.3)
    assert len(rows.unique()) == len(rows) == 15
    assert len(random_rows(noise, 1e-9)) == 1


def test_no_tensor_of_all_tokens_and_latents_is_alive_in_a_step(monkeypatch):
    monkeypatch.setitem(sae_lens_sampled.restricted.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(sae_lens_sampled.auxiliary.ROW_CHUNK_BYTES, "cpu", 1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for one in torch.utils._pytree.tree_leaves(result):
                if isinstance(one, torch.Tensor) and not one.is_sparse:
                    largest = max(largest, one.numel())
            return result

    for fields in ({}, {"pool_group_size": 16}, {"score": "ridge_leverage"}):
        sae = an_sae(d_sae=200, **fields)
        x = activations(800)
        with Watch():
            step(sae, x, 90).loss.backward()
        assert 200 * D_IN <= largest < 800 * 200 / 2, fields


def test_the_path_is_chosen_by_what_it_can_do():
    assert an_sae()._restricts()
    assert an_sae(score="ridge_leverage")._restricts()
    assert not an_sae(score="ridge_leverage", pool_group_size=16)._restricts()
    assert not an_sae(pool_group_size=8)._restricts()
    assert an_sae(pool_factor=60)._restricts()
    assert not an_sae(pool_factor=60, pool_group_size=16)._restricts()
    assert not an_sae(pool_factor=10, pool_group_size=16)._restricts()  # 30 of 200 latents, above 0.12
    assert an_sae(pool_factor=10, pool_group_size=21)._restricts()
    assert not an_sae(pool_factor=200 / 3)._restricts()
    sae = an_sae()
    handle = sae.hook_sae_acts_pre.add_hook(lambda tensor, hook: tensor)
    assert not sae._restricts()
    del handle
    sae.reset_hooks()
    assert sae._restricts()
    sae.hook_sae_acts_pre.add_hook(lambda gradient, hook: None, dir="bwd")
    assert not sae._restricts()


def test_a_score_of_ones_own_is_given_columns_only_if_it_said_so(monkeypatch):
    monkeypatch.setattr("sae_lens_sampled.scores.SCORES", SCORES)
    seen = []

    def largest(acts, pool_size):
        seen.append(acts.shape[-1])
        return acts.amax(dim=-2)

    try:
        register_score("largest", largest)
        register_score("largest_by_columns", largest, by_columns=True)
        for name, width in (("largest", 200), ("largest_by_columns", 64)):
            monkeypatch.setitem(sae_lens_sampled.restricted.CHUNK_BYTES, "cpu", 1)
            seen.clear()
            output = step(an_sae(score=name), activations(70))
            assert max(seen) == width
            assert output.feature_acts.is_sparse == (name == "largest_by_columns")
    finally:
        for name in ("largest", "largest_by_columns"):
            SCORES.pop(name, None)
            BY_COLUMNS.discard(name)


def test_saelens_trainer_counts_the_same_firings_on_both_paths(both_paths):
    trainers = []

    def fit(sae):
        stream = (activations(64, seed=100 + i) for i in range(50))
        config = SAETrainerConfig(
            total_training_samples=64 * 30, train_batch_size_samples=64, lr=3e-3, lr_end=3e-4, dead_feature_window=5
        )
        trainers.append(SAETrainer(config, sae, stream))
        trainers[-1].fit()
        return step(sae, activations(70))

    (mine, _), (theirs, _) = both_paths(an_sae(), fit)
    torch.testing.assert_close(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    assert torch.equal(trainers[0].n_forward_passes_since_fired, trainers[1].n_forward_passes_since_fired)
    torch.testing.assert_close(mine.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-4)


def test_kept_values_match_sorting_by_hand():
    sae, x = an_sae(), activations(70)
    acts = sae.encode_with_hidden_pre(x)[1].relu().detach()
    output = step(copy.deepcopy(sae), x)
    pools = oracles.pools(acts.tolist(), "l2_norm", 15, None)
    want = oracles.kept_values(acts.tolist(), pools, 210, None)
    assert sorted(output.feature_acts.values()[output.feature_acts.values() > 0].tolist()) == pytest.approx(
        want, rel=1e-5
    )


def test_the_fraction_is_checked():
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=rf"^aux_token_fraction={wrong} must be above 0 and at most 1\.$"):
            an_sae(aux_token_fraction=wrong)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, {"pool_sampling": "proportional"}], ids=str)
def test_only_the_host_read_and_the_coo_tensor_break_a_compiled_graph(fields):
    sae, given = an_sae(**fields), step_input(activations(48, seed=5))
    given.dead_neuron_mask = torch.arange(200) < 40
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(sae.training_forward_pass)(given).break_reasons
    assert {reason.user_stack[-1].name for reason in breaks} == {"_check_finite", "as_coo"}
