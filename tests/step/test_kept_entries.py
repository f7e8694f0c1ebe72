"""The step on the kept entries gives the same numbers as the dense path, its plain reference."""

import copy

import oracles
import pytest
import torch
from helpers import D_IN, activations, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from step_helpers import ALL, an_sae, assert_equal_steps, batch_of, on_both_paths, step

import sae_lens_sampled.step.chunks
import sae_lens_sampled.step.column_scan
import sae_lens_sampled.step.kept_entries
from sae_lens_sampled.step.column_scan import scan_columns
from sae_lens_sampled.step.kept_entries import find_candidates, keep_largest
from sae_lens_sampled.step.selection import PoolFields, column_statistics
from sae_lens_sampled.step.sparse_codes import Weights

POOLS = [
    {},
    {"k": 2.6},
    {"score": "entropy"},
    {"score": "frequency", "rescale_acts_by_decoder_norm": False},
    {"score": "ridge_leverage"},
    {"score": "perplexity", "pool_sampling": "proportional"},
    {"score": "uniform", "pool_sampling": "proportional", "pool_group_size": 16},
    {"pool_group_size": 16},
    {"pool_group_size": 21, "score": "squared_l2", "pool_factor": 20},
    {"pool_group_size": 16, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
    ALL,
    {"pool_factor": 80, "k": 2.6, "rescale_acts_by_decoder_norm": False},
]


some_pools = pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, ALL], ids=str)


@pytest.fixture(params=["columns", "entries"])
def way(request, monkeypatch):
    """A single small pool is computed by its columns; here also by its entries, like all other pools."""
    if request.param == "entries":
        monkeypatch.setattr(sae_lens_sampled.step.kept_entries, "MAX_COLUMNS_SHARE", 0)
        monkeypatch.setattr(sae_lens_sampled.step.column_scan, "MAX_EXTRACTED_SHARE", 0.8)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("n_dead", [0, 4, 100])
@pytest.mark.parametrize("fields", POOLS, ids=str)
def test_three_steps_leave_everything_as_the_dense_path_does(fields, n_dead):
    def steps(sae):
        for number in range(2):
            step(sae, activations(70, seed=number), n_dead, number)
        return step(sae, activations(70, seed=9), n_dead, 2)

    assert_equal_steps(*on_both_paths(an_sae(**fields), steps))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "fields", [{}, {"pool_group_size": 16}, ALL, {"k": 0.01}, {"k": 0.01, "pool_factor": 1e5}], ids=str
)
def test_too_few_positive_entries_are_counted_as_on_the_dense_path(fields):
    sae = an_sae(**fields)
    sae.b_enc.data -= 6  # leaves at most half of the budget positive
    outputs = []
    for path in ("kept", "dense"):
        copied = copy.deepcopy(sae)
        copied.cfg.step, copied.cfg.use_sparse_activations = path, False
        outputs.append((copied, step(copied, activations(70, seed=3))))
    assert_equal_steps(*outputs)
    assert (outputs[0][1].feature_acts > 0).sum() < max(1, sae.cfg.k * 70)


@pytest.mark.usefixtures("way")
@some_pools
def test_every_buffer_and_weight_over_twenty_steps_of_training(fields):
    trained = []
    for path in ("kept", "dense"):
        sae = an_sae(**fields, dtype="float64", step=path)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for number in range(20):
            output = step(sae, activations(70, seed=number).double(), 5 * number, number)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(sae.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-6, atol=1e-7, msg=name)


whole = st.integers(-3, 3).map(float)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(2, 90)),
    k=st.floats(0.1, 6),
    pool_factor=st.sampled_from([1.0, 2.5, 1e6]),
    group_size=st.none() | st.integers(1, 13),
    cutoff=st.sampled_from([0.0, 1.0, 2.5, 1e9]),
    chunk=st.sampled_from([1, 2**20]),
    seed=st.integers(0, 10**6),
)
def test_kept_entries_match_plain_loops_with_ties(sizes, k, pool_factor, group_size, cutoff, chunk, seed):
    """Integers: ties everywhere, exact sums. Ties go to the lowest (token, latent), whatever the bound."""
    n_tokens, d_in, d_sae = sizes
    k = min(k, float(d_sae))
    generator = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc = (
        torch.randint(-2, 3, shape, generator=generator).float()
        for shape in ((n_tokens, d_in), (d_in, d_sae), (d_sae,))
    )
    weights = Weights(W_enc, b_enc, torch.zeros(d_sae, d_in), None)
    cfg = PoolFields(pool_factor=pool_factor, pool_group_size=group_size)
    cfg.k, cfg.d_sae = k, d_sae
    batch, bound = batch_of(x, weights, torch.zeros(d_sae), cfg), torch.tensor(0.8 * cutoff)
    n_keep = int(k * n_tokens)
    acts = (x @ W_enc + b_enc).relu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sae_lens_sampled.step.chunks.CHUNK_BYTES, "cpu", chunk)
        patch.setattr(sae_lens_sampled.step.column_scan, "MAX_EXTRACTED_SHARE", 1)
        extracted = scan_columns(batch, None, bound).extracted
        pool = None
        if cfg.n_candidates < d_sae:
            pool = sae_lens_sampled.step.kept_entries.choose_pool(
                column_statistics(acts, "l2_norm", cfg.n_candidates, group_size), cfg, batch.draw
            )
        candidates, _ = find_candidates(batch, pool, bound, extracted)
    pools = oracles.pools(acts.tolist(), "l2_norm", cfg.n_candidates, group_size)
    want = oracles.kept_places(acts.tolist(), pools, n_keep, group_size)
    if candidates is None:  # too many entries were extracted: only with a budget of 0
        assert n_keep == 0
        return
    kept = keep_largest(candidates, n_keep)
    assert list(zip(kept.tokens.tolist(), kept.latents.tolist(), strict=True)) == want
    assert torch.equal(kept.values, acts[kept.tokens, kept.latents])


@pytest.mark.parametrize("parameter", ["W_enc", "b_enc", "W_dec"])
@pytest.mark.parametrize("path", ["kept", "dense"])
def test_a_single_nan_ends_in_a_loss_that_is_nan_and_in_no_bound(parameter, path):
    sae = an_sae(**ALL, step=path)
    step(sae, activations(70, seed=5))
    getattr(sae, parameter).data[(0,) * getattr(sae, parameter).ndim] = torch.nan
    assert step(sae, activations(70)).loss.isnan()
    assert sae.pool_record.cutoff.isfinite()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, {"score": "ridge_leverage"}], ids=str)
def test_broken_weights_end_in_a_loss_that_is_nan(fields):
    sae = an_sae(**fields)
    sae.W_enc.data.fill_(torch.nan)
    assert step(sae, activations(70)).loss.isnan()


@pytest.mark.usefixtures("way")
@some_pools
def test_a_latent_whose_decoder_row_is_zero_is_never_kept(fields):
    """SAELens' code computes 0 / 0 = NaN there, and so does the dense path."""
    sae = an_sae(**fields)
    sae.W_dec.data[7] = sae.W_dec.data[70] = 0
    sae.b_enc.data[60:160] -= 50  # its 0 is the largest of the dead ones' values, which may be negative
    output = step(sae, activations(70), 100)
    assert output.feature_acts.to_dense()[:, [7, 70]].count_nonzero() == 0
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(sae, output).values())
    assert step(an_sae_like(sae, step="dense"), activations(70)).loss.isnan()


def an_sae_like(sae, **fields):
    copied = copy.deepcopy(sae)
    for name, value in fields.items():
        setattr(copied.cfg, name, value)
    return copied


@pytest.mark.usefixtures("way")
@some_pools
def test_feature_acts_are_coalesced_as_they_say(fields):
    indices = step(an_sae(**fields), activations(7, 10)).feature_acts.indices()
    flat = (indices[0] * 10 + indices[1]) * 200 + indices[2]
    assert (flat.diff() > 0).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("use_sparse_activations", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@some_pools
def test_a_loss_on_the_activations_has_its_gradient(fields, rescale, use_sparse_activations):
    results = []
    for path in ("kept", "dense"):
        sae = an_sae(
            **fields, rescale_acts_by_decoder_norm=rescale, use_sparse_activations=use_sparse_activations, step=path
        )
        output = step(sae, activations(70))
        assert output.feature_acts.is_sparse == (path == "kept" and use_sparse_activations)
        output.loss = output.loss + output.feature_acts.to_dense().square().sum()
        results.append(gradients(sae, output))
    torch.testing.assert_close(*results)


def test_silent_latents_have_a_peak_of_zero():
    sae = an_sae()
    sae.b_enc.data[7] = -1e3
    for copied, _ in on_both_paths(sae, lambda sae: step(sae, activations(70, seed=3))):
        assert copied.rate_matcher.peak[7] == 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(70,), (7, 10), (2, 5, 7)], ids=str)
@some_pools
def test_leading_dimensions_stay(shape, fields):
    assert_equal_steps(*on_both_paths(an_sae(**fields), lambda sae: step(sae, activations(*shape, seed=3))))


@pytest.mark.usefixtures("way")
@some_pools
def test_heads_are_merged_as_saelens_merges_them(fields):
    sae = an_sae(**fields)
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"

    def heads(sae):
        sae.turn_on_forward_pass_hook_z_reshaping()
        return step(sae, activations(70, seed=3).view(70, 3, D_IN // 3), 30)

    mine, theirs = on_both_paths(sae, heads)
    assert mine[1].sae_out.shape == (70, 3, D_IN // 3)
    assert_equal_steps(mine, theirs)


@pytest.mark.usefixtures("way")
@some_pools
def test_double_precision(fields):
    sae = an_sae(dtype="float64", **fields)
    results = on_both_paths(sae, lambda sae: step(sae, activations(70).double(), 90))
    assert_equal_steps(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("way")
@some_pools
@pytest.mark.parametrize("fields_of_dtype", [{}, {"dtype": "bfloat16"}], ids=["autocast", "autocast, bfloat16"])
def test_autocast_keeps_scores_and_thresholds_in_float32(fields, fields_of_dtype):
    def under_autocast(sae):
        with torch.autocast("cpu", torch.bfloat16):
            return step(sae, activations(70), 90)

    assert_close_in_bfloat16(*on_both_paths(an_sae(**fields, **fields_of_dtype), under_autocast))


@pytest.mark.usefixtures("way")
@some_pools
def test_parameters_in_bfloat16(fields):
    sae = an_sae(**fields, dtype="bfloat16")
    assert_close_in_bfloat16(*on_both_paths(sae, lambda sae: step(sae, activations(70), 90)))


def assert_close_in_bfloat16(kept, dense):
    (mine, got), (theirs, want) = kept, dense
    values, wanted = (output.feature_acts.to_dense().flatten().float().sort().values for output in (got, want))
    torch.testing.assert_close(values, wanted, rtol=0.02, atol=0.02)
    torch.testing.assert_close(got.losses, want.losses, rtol=0.02, atol=1e-3, check_dtype=False)
    mine_gradients, their_gradients = gradients(mine, got), gradients(theirs, want)
    for name, gradient in mine_gradients.items():
        assert gradient.dtype == their_gradients[name].dtype
        similarity = torch.cosine_similarity(gradient.flatten().float(), their_gradients[name].flatten().float(), dim=0)
        assert similarity > 0.98, name
    assert mine.latent_threshold.dtype == torch.float32


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, ALL, {"apply_b_dec_to_input": False}], ids=str)
def test_gradients_of_a_step_are_those_of_differences(fields):
    """Gradients of the reconstruction loss, along a random direction for each parameter and for the input."""
    generator = torch.Generator().manual_seed(0)
    x = activations(40).double()

    def loss(name=None, shift=0.0):
        sae, given = an_sae(dtype="float64", **fields), x.clone()
        if name is not None:
            (given if name == "x" else getattr(sae, name).data).add_(shift)
        given.requires_grad_()
        output = step(sae, given)
        assert output.feature_acts.is_sparse
        return sae, given, output.loss

    sae, given, value = loss()
    value.backward()
    for name in ("x", "W_enc", "b_enc", "W_dec", "b_dec"):
        gradient = given.grad if name == "x" else getattr(sae, name).grad
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.double)
        slope = (loss(name, 1e-6 * direction)[2] - loss(name, -1e-6 * direction)[2]).item() / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4), name


@pytest.mark.usefixtures("way")
@some_pools
def test_saelens_trainer_counts_the_same_firings_on_both_paths(fields):
    trainers = []

    def fit(sae):
        stream = (activations(64, seed=100 + i) for i in range(50))
        config = SAETrainerConfig(
            total_training_samples=64 * 30, train_batch_size_samples=64, lr=3e-3, lr_end=3e-4, dead_feature_window=5
        )
        trainers.append(SAETrainer(config, sae, stream))
        trainers[-1].fit()
        return step(sae, activations(70))

    (mine, _), (theirs, _) = on_both_paths(an_sae(**fields), fit)
    torch.testing.assert_close(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    assert torch.equal(trainers[0].n_forward_passes_since_fired, trainers[1].n_forward_passes_since_fired)
    torch.testing.assert_close(mine.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-4)
