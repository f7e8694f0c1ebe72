"""The step on the kept entries gives the numbers of the dense path, its plain reference."""

import copy

import oracles
import pytest
import torch
from helpers import D_IN, activations, gradients, step_input
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig

import sae_lens_sampled.chunks
import sae_lens_sampled.column_scan
import sae_lens_sampled.kept_entries
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, register_score
from sae_lens_sampled.column_scan import scan_columns
from sae_lens_sampled.kept_entries import choose_path, find_candidates, keep_largest
from sae_lens_sampled.pool_record import PoolRecord
from sae_lens_sampled.scores import BY_COLUMNS, SCORES
from sae_lens_sampled.selection import PoolFields, column_statistics
from sae_lens_sampled.sparse_codes import Weights

ALL = {"pool_factor": 200 / 3}
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


def an_sae(**fields):
    given = {"d_in": D_IN, "d_sae": 200, "k": 3, "pool_factor": 5, "step": "kept", **fields}
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(**given))
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.02)
    return sae


def step(sae, x, n_dead=0, number=0):
    given = step_input(x, step=number)
    given.dead_neuron_mask = torch.zeros(200, dtype=torch.bool)
    given.dead_neuron_mask[60 : 60 + n_dead] = True
    return sae.training_forward_pass(given)


@pytest.fixture(params=["columns", "entries"])
def way(request, monkeypatch):
    """One small pool has its columns computed; here also by entries, as all other pools."""
    if request.param == "entries":
        monkeypatch.setattr(sae_lens_sampled.kept_entries, "MAX_COLUMNS_SHARE", 0)
        monkeypatch.setattr(sae_lens_sampled.kept_entries, "MAX_EXTRACTED_SHARE", 0.8)
    return request.param


def on_both_paths(sae, function):
    """The SAE and what `function` returned, with the step on the kept entries and with the dense one."""
    results = []
    for path in ("kept", "dense"):
        copied = copy.deepcopy(sae)
        copied.cfg.step = path
        output = function(copied)
        assert output.feature_acts.is_sparse == (path == "kept")
        results.append((copied, output))
    return results


def assert_equal_steps(kept, dense, **tolerance):
    (mine, got), (theirs, want) = kept, dense
    assert got.feature_acts.shape == want.feature_acts.shape
    torch.testing.assert_close(got.feature_acts.to_dense(), want.feature_acts, **tolerance)
    torch.testing.assert_close(got.sae_out, want.sae_out, **tolerance)
    torch.testing.assert_close(got.losses, want.losses, **tolerance)
    mine_gradients, their_gradients = gradients(mine, got), gradients(theirs, want)
    for name, gradient in mine_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], msg=name, **tolerance)
    for name, buffer in mine.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], msg=name)


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
    sae.b_enc.data -= 6  # at most half of what may be kept
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
    """Whole numbers: ties everywhere, exact sums. Of equals the lowest (token, latent) stay, whatever the bound."""
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
    record, bound = PoolRecord(d_sae, torch.device("cpu")), torch.tensor(0.8 * cutoff)
    n_keep, threshold = int(k * n_tokens), torch.zeros(d_sae)
    acts = (x @ W_enc + b_enc).relu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sae_lens_sampled.chunks.CHUNK_BYTES, "cpu", chunk)
        patch.setattr(sae_lens_sampled.kept_entries, "MAX_EXTRACTED_SHARE", 1)
        extracted = scan_columns(x, weights, threshold, cfg, None, bound, 10**6 * n_keep).extracted
        pool = None
        if cfg.n_candidates < d_sae:
            pool = sae_lens_sampled.kept_entries.choose_pool(
                column_statistics(acts, "l2_norm", cfg.n_candidates, group_size), cfg, record.n_steps
            )
        candidates, _, _ = find_candidates(x, weights, threshold, cfg, record, pool, n_keep, bound, extracted)
    pools = oracles.pools(acts.tolist(), "l2_norm", cfg.n_candidates, group_size)
    want = oracles.kept_places(acts.tolist(), pools, n_keep, group_size)
    if candidates is None:  # nothing may be kept, and more than nothing may be extracted
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
    """SAELens' code gives NaN there, by 0 / 0, and so does the dense path."""
    sae = an_sae(**fields)
    sae.W_dec.data[7] = sae.W_dec.data[70] = 0
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


@pytest.mark.parametrize("n_bytes", [1, 64 * 70 * 4, 100 * 70 * 4, 2**30])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("score", sorted(BY_COLUMNS))
def test_the_scan_sees_what_the_whole_matrix_shows_whatever_the_chunk(monkeypatch, score, group_size, n_bytes):
    monkeypatch.setitem(sae_lens_sampled.chunks.CHUNK_BYTES, "cpu", n_bytes)
    sampling = "proportional" if score == "uniform" else "top"
    sae, x = an_sae(score=score, pool_group_size=group_size, pool_sampling=sampling), activations(70)
    norms, threshold, dead = sae.W_dec.norm(dim=1), torch.linspace(0, 3, 200), torch.tensor([3, 63, 64, 65, 199])
    weights = Weights(sae.W_enc, sae.b_enc, sae.W_dec, norms)
    scan = scan_columns(x, weights, threshold, sae.cfg, dead, torch.tensor(2.0), 10**6)
    hidden_pre = ((x @ sae.W_enc + sae.b_enc) * norms).detach()
    want = column_statistics(hidden_pre.relu(), score, 15, group_size)
    for got, statistic in zip(scan.statistics, want, strict=True):
        torch.testing.assert_close(got, statistic)
    near = ((hidden_pre - threshold).abs() < 1e-5).sum(dim=0)
    assert ((scan.n_fired - (hidden_pre > threshold).sum(dim=0)).abs() <= near).all()
    torch.testing.assert_close(scan.peak, hidden_pre.amax(dim=0).relu())
    torch.testing.assert_close(scan.dead_pre, hidden_pre[:, dead].T)
    values, tokens, latents = scan.extracted.inside(None, 70)
    torch.testing.assert_close(values, hidden_pre[tokens, latents])
    assert ((latents * 70 + tokens).diff() > 0).all()
    assert abs(len(values) - (hidden_pre > 2).sum()) <= ((hidden_pre - 2).abs() < 1e-5).sum()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, ALL, {"apply_b_dec_to_input": False}], ids=str)
def test_gradients_of_a_step_are_those_of_differences(fields):
    """Of the reconstruction loss, along a random direction of each parameter and of the input."""
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


@pytest.mark.parametrize("fields", [{"pool_group_size": 16, "pool_factor": 20}, ALL], ids=str)
def test_a_bound_too_high_or_too_low_costs_a_scan_and_changes_nothing(fields):
    sae, x = an_sae(**fields), activations(70)
    want = step(copy.deepcopy(sae), x).feature_acts
    for cutoff, n_scans in ((1e9, 1), (want.values().min().item(), 0), (1e-9, 1)):
        copied = copy.deepcopy(sae)
        copied.pool_record.cutoff.fill_(cutoff)
        assert torch.equal(step(copied, x).feature_acts.to_dense(), want.to_dense())
        statistics = copied.pool_statistics()
        assert (statistics["second_scans"], statistics["dense_steps"]) == (n_scans, 0), cutoff
        assert 1 < statistics["extracted_per_kept"] < 0.25 * 70 * 200 / 210 + 1


def test_what_a_sparse_matrix_cannot_hold_runs_dense(monkeypatch):
    sae, x = an_sae(**ALL), activations(70)
    want = step(copy.deepcopy(sae), x).feature_acts
    monkeypatch.setattr(sae_lens_sampled.kept_entries, "MAX_EXTRACTED_SHARE", 0.001)
    got = step(sae, x).feature_acts
    assert not got.is_sparse
    torch.testing.assert_close(got, want.to_dense())
    assert sae.pool_statistics()["dense_steps"] == 1


def test_no_tensor_of_all_tokens_and_latents_is_alive_in_a_step(monkeypatch):
    monkeypatch.setitem(sae_lens_sampled.chunks.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(sae_lens_sampled.column_scan, "DEAD_BYTES", 0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                    largest = max(largest, leaf.numel())
            return result

    for fields in ({}, {"pool_group_size": 16, "pool_factor": 20}, {"score": "ridge_leverage"}, ALL):
        sae, x = an_sae(**fields), activations(800)
        step(sae, x)  # the first step estimates its bound from some rows, here a large part of all
        with Watch():
            step(sae, x, 90).loss.backward()
        assert 200 * D_IN <= largest < 800 * 200 / 2, fields
        assert sae.pool_statistics()["second_scans"] == 0


@pytest.mark.parametrize("room", [0, 2**20])
def test_the_dead_are_the_same_whether_the_scan_passes_them_on_or_not(monkeypatch, room):
    monkeypatch.setattr(sae_lens_sampled.column_scan, "DEAD_BYTES", room)
    monkeypatch.setitem(sae_lens_sampled.chunks.CHUNK_BYTES, "cpu", 1)
    assert_equal_steps(*on_both_paths(an_sae(**ALL), lambda sae: step(sae, activations(70), 100)))


def test_the_path_is_chosen_by_what_it_can_do_and_by_sizes(monkeypatch):
    def path(step="auto", n_tokens=4096, device="cpu", k=8, d_sae=4096, **fields):
        cfg = PoolFields(**{"pool_factor": 5, **fields})
        cfg.k, cfg.d_sae = k, d_sae
        return choose_path(cfg, step, n_tokens, torch.device(device))

    grouped, everything = {"pool_group_size": 16}, {"pool_factor": 512.0}
    assert path() == path(score="ridge_leverage") == path(pool_sampling="proportional") == "columns"
    assert path(**grouped) == path(**everything) == path(pool_factor=100) == "kept"
    assert path(score="ridge_leverage", **grouped) == "dense"
    assert path("kept", score="ridge_leverage", **grouped) == "dense"
    assert path(score="ridge_leverage", **everything) == "kept"  # nothing is scored
    assert path("dense") == path("dense", **everything) == "dense"
    assert path(n_tokens=16, **everything) == path(k=1024, **grouped) == "dense"
    assert path("kept", n_tokens=16, **everything) == "kept"
    assert path(device="cuda") == path(device="mps") == "columns"
    assert path(device="cuda", **grouped) == path(device="cuda", **everything) == "dense"
    assert path("kept", device="cuda", **grouped) == "kept"
    assert path("kept", device="mps", **grouped) == "dense"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert path() == "columns"
    assert path(**grouped) == path("kept", **grouped) == "dense"


def test_without_kernels_one_pool_takes_dense_products_of_its_columns(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    assert_equal_steps(*on_both_paths(an_sae(), lambda sae: step(sae, activations(70), 100)))


def test_hooks_and_methods_of_ones_own_take_the_dense_path():
    sae = an_sae()
    sae.hook_sae_acts_pre.add_hook(lambda tensor, hook: tensor)
    assert not step(sae, activations(70)).feature_acts.is_sparse
    sae.reset_hooks()
    assert step(sae, activations(70)).feature_acts.is_sparse
    sae.hook_sae_acts_pre.add_hook(lambda gradient, hook: None, dir="bwd")
    assert not step(sae, activations(70)).feature_acts.is_sparse

    class Own(SampledTopKTrainingSAE):
        def decode(self, feature_acts):
            return 0 * super().decode(feature_acts)

    own = Own(an_sae().cfg)
    assert (step(own, activations(70)).sae_out == 0).all()
    sae = an_sae()
    sae.calculate_aux_loss = lambda **_: {"mine": torch.tensor(7.0)}
    assert step(sae, activations(70)).losses["mine"] == 7


def test_the_path_is_said_once(caplog):
    sae = an_sae(step="auto")
    with caplog.at_level("INFO", logger="sae_lens"):
        for _ in range(2):
            step(sae, activations(70))
    [line] = [record.message for record in caplog.records if "path" in record.message]
    assert line == "sampled_topk: training steps of 70 tokens on cpu take the path 'columns'"


def test_a_score_of_ones_own_is_given_columns_only_if_it_said_so(monkeypatch):
    monkeypatch.setattr("sae_lens_sampled.scores.SCORES", SCORES)
    seen = []

    def largest(acts, n_candidates):
        seen.append(acts.shape[-1])
        return acts.amax(dim=-2)

    try:
        register_score("largest", largest)
        register_score("largest_by_columns", largest, by_columns=True)
        for name, width in (("largest", 200), ("largest_by_columns", 64)):
            monkeypatch.setitem(sae_lens_sampled.chunks.CHUNK_BYTES, "cpu", 1)
            seen.clear()
            output = step(an_sae(score=name), activations(70))
            assert max(seen) == width
            assert output.feature_acts.is_sparse == (name == "largest_by_columns")
    finally:
        for name in ("largest", "largest_by_columns"):
            SCORES.pop(name, None)
            BY_COLUMNS.discard(name)


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


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match=r"^step='fast' must be one of auto, kept, dense\.$"):
        an_sae(step="fast")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, {"pool_sampling": "proportional"}, ALL], ids=str)
def test_compiling_traces_up_to_the_host_read_and_leaves_the_kept_entries_as_they_are(fields):
    sae, given = an_sae(**fields), step_input(activations(48, seed=5))
    given.dead_neuron_mask = torch.arange(200) < 40
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(sae.training_forward_pass)(given).break_reasons
    assert [reason.user_stack[-1].name for reason in breaks] == ["check_finite"]
