"""How a step is computed, what it reads, and what it costs."""

import copy
import math

import oracles
import pytest
import torch
from helpers import D_IN, activations, step_input
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from step_helpers import ALL, an_sae, assert_equal_steps, batch_of, on_both_paths, step

import sae_lens_sampled.step.chunks
import sae_lens_sampled.step.column_scan
import sae_lens_sampled.step.kept_entries
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, register_score
from sae_lens_sampled.step.column_scan import scan_columns
from sae_lens_sampled.step.kept_entries import choose_path
from sae_lens_sampled.step.ranks import ALONE
from sae_lens_sampled.step.scores import SCORES, goes_by_columns
from sae_lens_sampled.step.selection import PoolFields, column_statistics
from sae_lens_sampled.step.sparse_codes import Weights

some_pools = pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}, ALL], ids=str)


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


def test_the_columns_of_a_pool_are_not_extracted():
    sae, x = an_sae(pool_factor=1.5), activations(70)
    assert step(sae, x).path == "columns"
    assert sae.pool_statistics()["extracted_per_kept"] == 0


def test_batches_too_large_for_a_sparse_matrix_run_dense(monkeypatch):
    sae, x = an_sae(**ALL), activations(70)
    want = step(copy.deepcopy(sae), x).feature_acts
    monkeypatch.setattr(sae_lens_sampled.step.column_scan, "MAX_EXTRACTED_SHARE", 0.001)
    got = step(sae, x).feature_acts
    assert not got.is_sparse
    torch.testing.assert_close(got, want.to_dense())
    assert sae.pool_statistics()["dense_steps"] == 1


def test_no_tensor_of_all_tokens_and_latents_is_alive_in_a_step(monkeypatch):
    monkeypatch.setitem(sae_lens_sampled.step.chunks.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(sae_lens_sampled.step.column_scan, "DEAD_BYTES", 0)
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
        step(sae, x)  # the first step estimates its bound from some rows, here a large share of them
        with Watch():
            step(sae, x, 90).loss.backward()
        assert 200 * D_IN <= largest < 800 * 200 / 2, fields
        assert sae.pool_statistics()["second_scans"] == 0


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
    sae.reset_hooks()
    handle = sae.hook_sae_acts_post.register_forward_hook(lambda module, args, output: None)  # torch's own
    assert not step(sae, activations(70)).feature_acts.is_sparse
    handle.remove()
    assert step(sae, activations(70)).feature_acts.is_sparse

    class Own(SampledTopKTrainingSAE):
        def decode(self, feature_acts):
            return 0 * super().decode(feature_acts)

    own = Own(an_sae().cfg)
    assert (step(own, activations(70)).sae_out == 0).all()
    sae = an_sae()
    sae.calculate_aux_loss = lambda **_: {"mine": torch.tensor(7.0)}
    assert step(sae, activations(70)).losses["mine"] == 7


def test_an_overridden_encoder_must_return_the_pool():
    class Half(SampledTopKTrainingSAE):
        def encode_with_pool(self, x, ranks=ALONE, fields=None):
            acts, hidden_pre, pool = super().encode_with_pool(x, ranks, fields)
            return acts / 2, hidden_pre, pool

    class WithoutPool(SampledTopKTrainingSAE):
        def encode_with_hidden_pre(self, x):
            return super().encode_with_hidden_pre(x)

    plain, half = an_sae(step="dense"), Half(an_sae().cfg)
    half.load_state_dict(plain.state_dict())
    want, got = step(plain, activations(70)), step(half, activations(70))
    assert torch.equal(got.feature_acts, want.feature_acts / 2)
    assert torch.equal(got.pool, want.pool)
    message = "^WithoutPool overrides encode_with_hidden_pre, but a training step calls encode_with_pool"
    with pytest.raises(ValueError, match=message):
        step(WithoutPool(an_sae().cfg), activations(70))


def test_the_path_is_said_once(caplog):
    sae = an_sae(step="auto")
    with caplog.at_level("INFO", logger="sae_lens"):
        for _ in range(2):
            step(sae, activations(70))
    [line] = [record.message for record in caplog.records if "path" in record.message]
    assert line == "sampled_topk: training steps of 70 tokens on cpu take the path 'columns'"


@pytest.mark.parametrize(
    ("fields", "is_told"),
    [
        ({}, True),
        ({"pool_group_size": 16}, False),
        ({"pool_factor": None}, False),
        ({"pool_sampling": "proportional"}, False),
    ],
    ids=str,
)
def test_what_one_pool_does_is_logged_once_with_the_alternatives(fields, is_told, caplog):
    sae = an_sae(**fields)
    with caplog.at_level("INFO", logger="sae_lens"):
        for _ in range(2):
            step(sae, activations(64))
    lines = [record.message for record in caplog.records if "one pool" in record.message]
    assert len(lines) == is_told
    other = "pool_factor=10, pool_group_size=16 lets most latents in"
    for line in lines:
        assert line.startswith(f"sampled_topk: one pool of {sae.cfg.n_candidates} of 200 latents per batch, as in the")
        assert line.endswith("pool_factor=None, which is BatchTopK, is recommended; " + other)


def test_a_score_of_ones_own_is_given_columns_only_if_it_said_so(monkeypatch):
    monkeypatch.setattr("sae_lens_sampled.step.scores.SCORES", SCORES)
    seen = []

    def largest(acts, n_candidates):
        seen.append(acts.shape[-1])
        return acts.amax(dim=-2)

    try:
        register_score("largest", largest)
        register_score("largest_by_columns", largest, by_columns=True)
        for name, width in (("largest", 200), ("largest_by_columns", 64)):
            monkeypatch.setitem(sae_lens_sampled.step.chunks.CHUNK_BYTES, "cpu", 1)
            seen.clear()
            output = step(an_sae(score=name), activations(70))
            assert max(seen) == width
            assert output.feature_acts.is_sparse == (name == "largest_by_columns")
    finally:
        for name in ("largest", "largest_by_columns"):
            SCORES.pop(name, None)


@pytest.mark.parametrize("group_size", [None, 8])
def test_a_winsorised_score_takes_the_cutoff_of_the_step_before(group_size):
    saes = [an_sae(score="winsorised", pool_group_size=group_size, step=path) for path in ("kept", "dense")]
    changed = False
    for number in range(3):
        batch, dense = activations(32, seed=number), saes[1]
        groups = dense.encode_with_hidden_pre(batch)[1].relu().split(group_size or len(batch))

        def pools(cutoff, groups=groups):
            return [sorted(oracles.pool(acts.tolist(), "winsorised", 15, last_cutoff=cutoff)) for acts in groups]

        want, plain = pools(dense.pool_record.cutoff.item() or math.inf), pools(math.inf)
        outputs = [step(sae, batch, number=number) for sae in saes]
        assert [output.pool.tolist() for output in outputs] == [want, want]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
        changed |= want != plain
    assert changed


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match=r"^step='fast' must be one of auto, kept, dense\.$"):
        an_sae(step="fast")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "fields", [{}, {"pool_group_size": 16, "pool_steps": 1}, {"pool_sampling": "proportional"}, ALL], ids=str
)
def test_compiling_traces_up_to_the_host_read_and_leaves_the_kept_entries_as_they_are(fields):
    sae, given = an_sae(**fields), step_input(activations(48, seed=5))
    given.dead_neuron_mask = torch.arange(200) < 40
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(sae.training_forward_pass)(given).break_reasons
    assert [reason.user_stack[-1].name for reason in breaks] == ["read_step"]


@pytest.mark.parametrize("n_bytes", [1, 64 * 70 * 4, 100 * 70 * 4, 2**30])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("score", sorted(filter(goes_by_columns, SCORES)))
def test_the_scan_sees_what_the_whole_matrix_shows_whatever_the_chunk(monkeypatch, score, group_size, n_bytes):
    monkeypatch.setitem(sae_lens_sampled.step.chunks.CHUNK_BYTES, "cpu", n_bytes)
    sampling = "proportional" if score == "uniform" else "top"
    sae, x = an_sae(score=score, pool_group_size=group_size, pool_sampling=sampling), activations(70)
    norms, threshold, dead = sae.W_dec.norm(dim=1), torch.linspace(0, 3, 200), torch.tensor([3, 63, 64, 65, 199])
    weights = Weights(sae.W_enc, sae.b_enc, sae.W_dec, norms)
    scan = scan_columns(batch_of(x, weights, threshold, sae.cfg), dead, torch.tensor(2.0))
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


def test_an_activation_equal_to_its_threshold_does_not_fire():
    weights = Weights(torch.eye(3), torch.zeros(3), torch.eye(3), None)
    x, cfg = torch.tensor([[1.0, 2.0, 3.0]]), SampledTopKTrainingSAEConfig(d_in=3, d_sae=3, k=1)
    assert scan_columns(batch_of(x, weights, torch.tensor([0.5, 2.0, 3.5]), cfg)).n_fired.tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_under_autocast_the_scan_sees_what_autocast_products_give(dtype):
    """Autocast leaves float64 unchanged."""
    sae, x = an_sae(), activations(70).to(dtype)
    weights = Weights(*(weight.detach().to(dtype) for weight in (sae.W_enc, sae.b_enc, sae.W_dec)), None)
    with torch.autocast("cpu", torch.bfloat16):
        peak = scan_columns(batch_of(x, weights, torch.zeros(200), sae.cfg)).peak
        want = (x @ weights.W_enc + weights.b_enc).amax(dim=0).relu()
    torch.testing.assert_close(peak, want.to(peak), rtol=0, atol=0)


@pytest.mark.parametrize("room", [0, 2**20])
def test_the_dead_are_the_same_whether_the_scan_passes_them_on_or_not(monkeypatch, room):
    monkeypatch.setattr(sae_lens_sampled.step.column_scan, "DEAD_BYTES", room)
    monkeypatch.setitem(sae_lens_sampled.step.chunks.CHUNK_BYTES, "cpu", 1)
    assert_equal_steps(*on_both_paths(an_sae(**ALL), lambda sae: step(sae, activations(70), 100)))


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the multiplications in products of dense matrices, and the products with a sparse matrix."""

    n_dense, n_sparse = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            if left.layout == right.layout == torch.strided:
                self.n_dense += left.shape[0] * right.numel()
            else:
                self.n_sparse += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_step_of_saelens_is_six_products_and_one_of_ours_is_one(apply_b_dec_to_input):
    """Of size tokens x d_in x d_sae. Ours adds three sparse products: one decodes, two give gradients of weights."""
    fields = {"d_in": D_IN, "d_sae": 200, "k": 3, "apply_b_dec_to_input": apply_b_dec_to_input}
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**fields))
    ours = an_sae(**ALL, apply_b_dec_to_input=apply_b_dec_to_input)
    step(ours, activations(70))  # the cutoff is known from here on
    for sae, n_products, n_sparse in ((theirs, 6, 0), (ours, 1, 3)):
        with Products() as products:
            step(sae, activations(70)).loss.backward()
        assert products.n_dense == n_products * 70 * D_IN * 200
        assert products.n_sparse == n_sparse


def test_an_auxiliary_loss_of_ones_own_is_used():
    class Own(SampledTopKTrainingSAE):
        def calculate_topk_aux_loss(self, *args, **kwargs):
            return super().calculate_topk_aux_loss(*args, **kwargs) * 0 + 7

    sae = Own(an_sae().cfg)
    assert step(sae, activations(70), 100).losses["auxiliary_reconstruction_loss"] == 7
