"""Training steps with kernels, in Triton's interpreter, compared with steps without; `test_triton.py` runs it."""

import copy

import interpreter  # noqa: F401  makes it faster
import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, gradients, sampled_sae, step_input
from step_helpers import an_sae, batch_of
from step_helpers import step as step_of_200
from torch.utils._python_dispatch import TorchDispatchMode

import sae_lens_sampled.step.auxiliary
import sae_lens_sampled.step.chunks
import sae_lens_sampled.step.column_scan
import sae_lens_sampled.step.kept_entries
import sae_lens_sampled.step.kernel_scan
import sae_lens_sampled.step.triton.row_sums
from sae_lens_sampled.step.column_scan import scan_columns
from sae_lens_sampled.step.kept_entries import keep_largest
from sae_lens_sampled.step.products import BY_CSR, Pattern, products_for
from sae_lens_sampled.step.selection import PoolFields
from sae_lens_sampled.step.sparse_codes import Weights
from sae_lens_sampled.step.triton import SUMS_OF_SCORE, available

ONE_POOL = {"pool_factor": 5}
GROUPS = {"pool_factor": 5, "pool_group_size": 16}
ALL = {"pool_factor": D_SAE / K}
STEPS = [
    ONE_POOL,
    GROUPS,
    ALL,
    {**ALL, "matryoshka_widths": [10, 25, D_SAE]},
    {**GROUPS, "matryoshka_widths": [10, D_SAE], "score": "perplexity", "rescale_acts_by_decoder_norm": False},
    {**GROUPS, "score": "winsorised"},
    {"pool_factor": 2, "score": "entropy", "apply_b_dec_to_input": False},
]
N_TOKENS = 21  # not a multiple of a group
N_DEAD = 20  # each token keeps 6 of them


def some(*fields):
    return pytest.mark.parametrize("fields", fields, ids=str)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(sae_lens_sampled.step.chunks, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(sae_lens_sampled.step.triton.row_sums, "BLOCK_ENTRIES", 32)  # 8 are slower here


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    """Switch the kernels on or off."""

    def switch(on):
        monkeypatch.setattr(sae_lens_sampled.step.triton, "interpreted", on)
        assert available(torch.device("cpu")) == on

    switch(True)
    return switch


def step(sae, x, n_dead=0, number=0):
    return sae.training_forward_pass(step_input(x, n_dead, number))


def on_both(by_kernels, sae, function):
    """The SAE, what `function` returned, and its gradients, with kernels and without."""
    results = []
    for on in (True, False):
        by_kernels(on)
        copied = copy.deepcopy(sae)
        output = function(copied)
        results.append((copied, output, gradients(copied, output)))
    by_kernels(True)
    return results


def assert_equal(by_kernels, without, **tolerance):
    (mine, got, my_gradients), (theirs, want, their_gradients) = by_kernels, without
    assert got.path == want.path
    a, b = got.feature_acts.coalesce(), want.feature_acts.coalesce()
    assert torch.equal(a.indices(), b.indices())
    torch.testing.assert_close(a.values(), b.values(), **tolerance)
    torch.testing.assert_close(got.sae_out, want.sae_out, **tolerance)
    torch.testing.assert_close(got.losses, want.losses, **tolerance)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(my_gradients[name], gradient, msg=name, **tolerance)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(mine.named_buffers())[name], buffer, msg=name)


@pytest.mark.parametrize(
    ("fields", "n_dead"), [*((fields, N_DEAD) for fields in STEPS), (GROUPS, 0), (ALL, 9)], ids=str
)
def test_steps_are_those_without_kernels(fields, n_dead, by_kernels):
    def steps(sae):
        step(sae, activations(N_TOKENS, seed=0), n_dead, 0)
        return step(sae, activations(N_TOKENS, seed=1), n_dead, 1)

    with_kernels, without = on_both(by_kernels, sampled_sae(step="kept", **fields), steps)
    assert with_kernels[1].path == "kept"
    assert with_kernels[0].scan_record["second_scans"] > 0  # from the first step, which has no cutoff yet
    assert_equal(with_kernels, without)


def test_a_step_by_the_columns_of_a_small_pool(by_kernels, monkeypatch):
    monkeypatch.setattr(sae_lens_sampled.step.kept_entries, "MAX_COLUMNS_SHARE", 1)
    results = on_both(by_kernels, sampled_sae(), lambda sae: step(sae, activations(N_TOKENS), N_DEAD))
    assert results[0][1].path == "columns"
    assert_equal(*results)


@pytest.mark.parametrize(
    ("fields", "n_tokens"), [(ONE_POOL, 1), (GROUPS, 1), (ALL, 1), (ONE_POOL, 2), (ALL, 37)], ids=str
)
def test_batches_of_other_sizes(fields, n_tokens, by_kernels):
    sae = sampled_sae(step="kept", **fields)
    assert_equal(*on_both(by_kernels, sae, lambda sae: step(sae, activations(n_tokens), N_DEAD)))


@some(GROUPS, ALL)
def test_too_few_positive_entries(fields, by_kernels):
    sae = sampled_sae(step="kept", **fields)
    for bias, n_positive in ((-6, 100), (-1000, 0)):
        sae.b_enc.data += bias
        results = on_both(by_kernels, sae, lambda sae: step(sae, activations(N_TOKENS), N_DEAD))
        assert (results[0][1].feature_acts.coalesce().values() > 0).sum() <= n_positive
        assert_equal(*results)


@some(GROUPS)
def test_inputs_and_weights_in_bfloat16(fields, by_kernels):
    """As close to the step without kernels as that is to its float32 version: both round, but at different points."""
    sae = sampled_sae(step="kept", **fields)

    def under_autocast(sae):
        with torch.autocast("cpu", torch.bfloat16):
            return step(sae, activations(N_TOKENS), N_DEAD)

    assert_equal(*on_both(by_kernels, sae, under_autocast), rtol=1e-4, atol=1e-5)
    sae = sampled_sae(step="kept", dtype="bfloat16", **fields)
    [(_, mine, my_gradients), (_, want, their_gradients)] = on_both(
        by_kernels, sae, lambda sae: step(sae, activations(N_TOKENS).bfloat16(), N_DEAD)
    )
    assert mine.feature_acts.dtype == want.feature_acts.dtype == torch.bfloat16
    torch.testing.assert_close(mine.loss, want.loss, rtol=0.02, atol=0)
    for name, gradient in their_gradients.items():
        assert my_gradients[name].dtype == torch.bfloat16
        assert (my_gradients[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_float64_is_left_to_torch(by_kernels):
    sae = sampled_sae(step="kept", dtype="float64")
    with_kernels, without = on_both(by_kernels, sae, lambda sae: step(sae, activations(N_TOKENS).double(), N_DEAD))
    assert all(torch.equal(gradient, without[2][name]) for name, gradient in with_kernels[2].items())


@some(GROUPS, ALL)
def test_batches_that_do_not_fit_take_the_dense_path(fields, monkeypatch):
    monkeypatch.setattr(sae_lens_sampled.step.kernel_scan, "MAX_EXTRACTED_PER_KEPT", 0)
    monkeypatch.setattr(sae_lens_sampled.step.kernel_scan, "MIN_ROOM", N_DEAD)
    got, want = (step(sampled_sae(step=path, **fields), activations(N_TOKENS)) for path in ("kept", "dense"))
    assert got.path == "dense"
    assert torch.equal(got.feature_acts, want.feature_acts)


def test_repeats_are_equal_to_the_last_bit():
    saes = [sampled_sae(step="kept", **GROUPS) for _ in range(2)]
    first, second = (gradients(sae, step(sae, activations(N_TOKENS), N_DEAD)) for sae in saes)
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())


class Reads(TorchDispatchMode):
    """Records operations that would make the host wait for a GPU."""

    BY_NAME = (
        "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
    )  # fmt: skip

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, tolist = [], torch.Tensor.tolist
        # On a CPU, `tolist` does not dispatch an operation of torch.
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: self.names.append("tolist") or tolist(x))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.BY_NAME or by_mask or repeats:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def reads_of_a_step(sae, n_dead, monkeypatch):
    step_of_200(sae, activations(N_TOKENS, seed=0), n_dead, 0)
    x = activations(N_TOKENS, seed=1)
    with monkeypatch.context() as patch, Reads(patch) as reads:
        step_of_200(sae, x, n_dead, 1).loss.backward()
    return reads.names


@pytest.mark.parametrize(
    ("fields", "n_dead"),
    [
        ({"pool_factor": 5, "pool_sampling": "proportional", "score": "frequency"}, 0),
        ({**GROUPS, "score": "perplexity"}, 100),
        ({"pool_factor": None, "matryoshka_widths": [10, 50, 200]}, 9),
    ],
    ids=str,
)
def test_the_host_waits_twice_a_step(fields, n_dead, monkeypatch):
    """Once for the state of the batch, and once, after four chunks, for the number of candidates."""
    monkeypatch.setattr(sae_lens_sampled.step.kept_entries, "MAX_COLUMNS_SHARE", 0)
    assert reads_of_a_step(an_sae(**fields), n_dead, monkeypatch) == ["tolist", "tolist"]


def test_a_read_of_each_chunk_is_seen(by_kernels, monkeypatch):
    by_kernels(False)
    names = reads_of_a_step(an_sae(**GROUPS), 100, monkeypatch)
    assert names.count("nonzero") >= 4
    assert {"index", "_local_scalar_dense", "tolist"} <= set(names)


def scans(by_kernels, batch, **arguments):
    """The scan with kernels and without."""
    results = []
    for on in (True, False):
        by_kernels(on)
        results.append(scan_columns(batch, **arguments))
    by_kernels(True)
    return results


@pytest.mark.parametrize(
    ("score", "group_size"),
    [
        *((score, None) for score in SUMS_OF_SCORE),
        *((score, 21) for score in SUMS_OF_SCORE if score != "ridge_leverage"),  # such steps are dense
        *(("perplexity", size) for size in (2, 16, 70, 100)),
    ],
)
def test_scans_of_every_score_are_those_of_torch(score, group_size, by_kernels):
    cfg = PoolFields(score=score, pool_factor=2, pool_group_size=group_size)
    cfg.k, cfg.d_sae = 4, 150
    weights = Weights(torch.randn(D_IN, 150), torch.randn(150), torch.randn(150, D_IN), torch.rand(150))
    weights.b_enc[140:] = -100  # latents that never fire
    batch = batch_of(torch.randn(70, D_IN), weights, torch.rand(150), cfg)
    member = torch.rand(-(-70 // (group_size or 70)), 150) < 0.5
    bound, dead = torch.tensor(1.0), torch.tensor([3, 60, 66, 149])
    got, want = scans(by_kernels, batch, dead=dead, bound=bound, member=member)
    assert got.statistics is not None
    assert want.statistics is not None
    assert torch.equal(got.statistics.alive, want.statistics.alive)
    torch.testing.assert_close(got.statistics.norms, want.statistics.norms)
    torch.testing.assert_close(got.statistics.scores, want.statistics.scores, rtol=1e-5, atol=2e-6)
    assert torch.equal(got.n_fired, want.n_fired)
    torch.testing.assert_close(got.peak, want.peak)
    torch.testing.assert_close(got.dead_pre, want.dead_pre)
    entries = []
    for scan in (got, want):
        assert scan.extracted is not None
        inside = scan.extracted.inside(None, group_size or 70)
        assert inside is not None
        entries.append(inside.at((inside.tokens * 150 + inside.latents).argsort()))
    assert torch.equal(entries[0].tokens, entries[1].tokens)
    assert torch.equal(entries[0].latents, entries[1].latents)
    torch.testing.assert_close(entries[0].values, entries[1].values)


def test_nan_reaches_the_kept_entries_and_ties_are_kept_alike(by_kernels, monkeypatch):
    monkeypatch.setattr(sae_lens_sampled.step.column_scan, "MAX_EXTRACTED_SHARE", 0.8)
    cfg = PoolFields(pool_factor=None)
    cfg.k, cfg.d_sae = 2, 90
    x, W_enc = (torch.randint(-2, 3, shape).float() for shape in ((30, 4), (4, 90)))
    weights = Weights(W_enc, torch.zeros(90), torch.zeros(90, 4), None)
    for broken in (False, True):
        if broken:
            weights.W_enc[:, 50] = torch.nan
        batch = batch_of(x, weights, torch.zeros(90), cfg)
        kept = []
        for on in (True, False):
            by_kernels(on)
            extracted = scan_columns(batch, bound=torch.tensor(1.0)).extracted
            assert extracted is not None
            candidates = extracted.inside(None, 30)
            assert candidates is not None
            kept.append(keep_largest(candidates, 60))
        assert kept[0].values.isnan().sum() == (30 if broken else 0)
        assert all(torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) for a, b in zip(*kept, strict=True))


def test_every_product_equals_that_of_torch():
    rows, columns = torch.tensor([0, 0, 1, 3, 3, 3, 5]), torch.tensor([1, 4, 0, 4, 2, 0, 1])
    pattern = Pattern(rows, columns, (6, 5))
    values, W, X = torch.randn(7), torch.randn(5, 3), torch.randn(6, 3)
    products = products_for(values)
    assert products is not BY_CSR
    given = {"times": (values, W), "transposed_times": (values, X), "column_sums": (values,), "at_entries": (X, W)}
    for name, arguments in given.items():
        got, want = (getattr(which, name)(pattern, *arguments) for which in (products, BY_CSR))
        torch.testing.assert_close(got, want, msg=name)
