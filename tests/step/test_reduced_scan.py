"""A scan in bfloat16 keeps what a float32 step keeps, and its error bound holds.

REDUCED_SCAN_CASES=10000 python -m pytest tests/step/test_reduced_scan.py -k error_bound    # a longer search
"""

import os
from contextlib import contextmanager

import pytest
import torch
from helpers import D_IN, activations
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_ranks import on_ranks
from step_helpers import ALL, an_sae, assert_equal_steps, batch_of, step

import sae_lens_sampled.step.chunks
import sae_lens_sampled.step.column_scan
import sae_lens_sampled.step.kept_entries
import sae_lens_sampled.step.reduced_scan
from sae_lens_sampled import SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.kept_entries import kept_step
from sae_lens_sampled.step.reduced_scan import choose_scan, column_norms, reduced_product
from sae_lens_sampled.step.selection import PoolFields, keep_top_entries
from sae_lens_sampled.step.sparse_codes import Weights

N_CASES = int(os.environ.get("REDUCED_SCAN_CASES", "300"))
NO_DEAD = torch.zeros(0, dtype=torch.int64)
BOTH_ROUND_DOWN = 1 + 2.0**-8
"""Halfway between two bfloat16 numbers, of which the smaller is the even one."""


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """Several chunks per scan, and no limit on extracted entries, so that no step falls back to the dense path."""
    monkeypatch.setitem(sae_lens_sampled.step.chunks.CHUNK_BYTES, "cpu", 4096)
    monkeypatch.setattr(sae_lens_sampled.step.column_scan, "MAX_EXTRACTED_SHARE", 1)


@contextmanager
def watched_scans():
    """List of whether each scan for kept entries was in float32."""
    in_float32, scan = [], sae_lens_sampled.step.kept_entries.scan_columns

    def watched(*args, reduced):
        in_float32.append(reduced is None)
        return scan(*args, reduced=reduced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_lens_sampled.step.kept_entries, "scan_columns", watched)
        yield in_float32


@pytest.fixture
def scans():
    with watched_scans() as in_float32:
        yield in_float32


def all_latents(k, d_sae, **fields):
    cfg = PoolFields(**{"pool_factor": None} | fields)
    cfg.k, cfg.d_sae = k, d_sae
    return cfg


def a_batch(x, weights, k, scan, last_cutoff=0.0, **fields):
    batch = batch_of(x, weights, torch.zeros(len(weights.b_enc)), all_latents(k, len(weights.b_enc), **fields))
    return batch._replace(scan=scan, last_cutoff=torch.tensor(last_cutoff))


def on_both_scans(x, weights, k, last_cutoff=0.0, **fields):
    return [
        kept_step(a_batch(x, weights, k, scan, last_cutoff, **fields), "kept", NO_DEAD, 0)
        for scan in ("reduced", "full")
    ]


def random_case(generator, n_tokens, d_in, d_sae, log_scales=(0.0, 0.0), bias=0.0, kinds=()):
    """Inputs and weights with the properties named in `kinds`, which make rounding matter."""
    x, W_enc = (
        torch.randn(*shape, generator=generator) * 10.0**scale
        for shape, scale in zip(((n_tokens, d_in), (d_in, d_sae)), log_scales, strict=True)
    )
    if "adding up" in kinds:  # all products round alike, and a sum's terms have the same sign
        x, W_enc = torch.full_like(x, BOTH_ROUND_DOWN), torch.full_like(W_enc, BOTH_ROUND_DOWN)
        W_enc *= torch.ones(d_sae)[torch.randint(d_sae, (d_sae,), generator=generator)] * 2.0 ** log_scales[1]
        x[::2] *= -1
    if "wide" in kinds:  # terms of many magnitudes in one sum
        W_enc = W_enc * 2.0 ** torch.randint(-12, 1, W_enc.shape, generator=generator)
    if "large token" in kinds:
        x[0] *= 1000
    if "large column" in kinds:
        W_enc[:, -1] *= 1000
    if "zero column" in kinds:
        W_enc[:, 0] = 0
    if "subnormal" in kinds:
        x[-1], W_enc[:, d_sae // 2] = 1e-40, -1e-42
        W_enc[0] = 1e-41
    size = (x.norm(dim=1).median() * W_enc.norm(dim=0).median()).item() / d_in**0.5
    b_enc = torch.randn(d_sae, generator=generator) * size * bias
    norms = torch.rand(d_sae, generator=generator) * 3 if "norms" in kinds else None
    return x, Weights(W_enc, b_enc, torch.zeros(d_sae, d_in), norms)


KINDS = ("adding up", "wide", "large token", "large column", "zero column", "subnormal", "norms")
some_kinds = st.sets(st.sampled_from(KINDS))
sizes = st.tuples(st.integers(1, 24), st.integers(1, 80), st.integers(2, 150))


@settings(max_examples=150, deadline=None)
@example(sizes=(2, 70, 2), k=1.0, log_scales=(0.0, 1.171875), bias=0.0, kinds={"adding up"}, cutoff=0.0, seed=0)
@given(
    sizes=sizes,
    k=st.floats(0.1, 8),
    log_scales=st.tuples(st.floats(-6, 6), st.floats(-6, 6)),
    bias=st.sampled_from([0.0, 0.3, 1000.0]),
    kinds=some_kinds,
    cutoff=st.sampled_from([0.0, 0.5, 1.0, 1.2499, 4.0]),
    seed=st.integers(0, 10**6),
)
def test_what_is_kept_is_what_a_float32_step_keeps(sizes, k, log_scales, bias, kinds, cutoff, seed):
    """Whatever bound the extraction starts with: `cutoff` is the last batch's, in units of this batch's cutoff."""
    n_tokens, d_in, d_sae = sizes
    x, weights = random_case(torch.Generator().manual_seed(seed), *sizes, log_scales, bias, kinds)
    k = min(k, float(d_sae))
    acts = weights.hidden_pre(x).relu().flatten()
    this_cutoff = acts.topk(int(k * n_tokens)).values[-1] if int(k * n_tokens) else torch.zeros(())
    batch = a_batch(x, weights, k, "reduced", cutoff * this_cutoff.item())
    with watched_scans() as in_float32:
        reduced = kept_step(batch, "kept", NO_DEAD, 0)
    assert in_float32
    assert not any(in_float32)
    full = kept_step(batch._replace(scan="full"), "kept", NO_DEAD, 0)
    assert reduced is not None
    assert full is not None
    # Bound on the difference of two float32 sums of d_in products (Higham 2002, section 3.1), in units of their largest
    # part. Where the bias cancels that part, the difference is not small compared with the sum.
    unit = max(1e-6, 2 * d_in * 2.0**-24)
    largest = x.norm(dim=1)[:, None] * weights.W_enc.norm(dim=0) + weights.b_enc.abs()
    largest = largest if weights.norms is None else largest * weights.norms
    near = (acts - this_cutoff).abs() <= unit * largest.flatten() + 1e-37
    ours, theirs = (torch.zeros_like(near) for _ in range(2))
    ours[reduced.kept.tokens * d_sae + reduced.kept.latents] = True
    theirs[full.kept.tokens * d_sae + full.kept.latents] = True
    assert not ((ours != theirs) & ~near).any()
    where = reduced.kept.tokens * d_sae + reduced.kept.latents
    rounding = unit * largest.flatten()[where] + 1e-37
    assert ((reduced.kept.values - acts[where]).abs() <= rounding).all()


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes,
    k=st.floats(0.1, 6),
    largest=st.sampled_from([2, 3, 300, 500]),
    cutoff=st.sampled_from([0.0, 1.0, 2.5, 1e9]),
    seed=st.integers(0, 10**6),
)
def test_whole_numbers_are_kept_to_the_last_bit(sizes, k, largest, cutoff, seed):
    """Their float32 sums, and so ties at the cutoff, are exact; above 256 not all of them are bfloat16 numbers."""
    n_tokens, d_in, d_sae = sizes
    generator = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc = (
        torch.randint(-largest, largest, shape, generator=generator).float()
        for shape in ((n_tokens, d_in), (d_in, d_sae), (d_sae,))
    )
    weights = Weights(W_enc, b_enc, torch.ones(d_sae, d_in), None)
    reduced, full = on_both_scans(x, weights, min(k, float(d_sae)), cutoff)
    for name, mine, theirs in zip(full.kept._fields, reduced.kept, full.kept, strict=True):
        assert torch.equal(mine, theirs), name


def largest_error(x, weights):
    """Largest error of scanned entries, compared with float64 and with float32 ones, in units of the bound."""
    product = reduced_product(x, weights, torch.tensor(0.0), "reduced")
    assert product is not None
    scanned = torch.cat([chunk.clone() for _, chunk in product.chunks()]).T.double()
    bound = product.x_norm[:, None] * product.slope + product.offset
    doubles = Weights(*(w if w is None else w.double() for w in weights))
    exact = [doubles.hidden_pre(x.double()), weights.hidden_pre(x).double()]
    return max(((scanned - wanted).abs() / bound).max().item() for wanted in exact)


def test_the_error_bound_holds_and_is_nearly_reached():
    errors = []
    for seed in range(N_CASES):
        generator = torch.Generator().manual_seed(seed)
        kinds = [kind for kind in KINDS if torch.rand((), generator=generator) < 0.3]
        shape = [int(torch.randint(1, most, (), generator=generator)) for most in (9, 300, 40)]
        scales = tuple(torch.empty(2).uniform_(-6, 6, generator=generator).tolist())
        bias = [0.0, 1.0, 1000.0][seed % 3]
        errors.append(largest_error(*random_case(generator, *shape, scales, bias, kinds)))
    assert max(errors) <= 1
    assert max(errors) > 0.6


@pytest.mark.parametrize("share", [2.0**-8, 2.0**-8 - 2.0**-20, 2.0**-7 - 2.0**-20])
@pytest.mark.parametrize("d_in", [1, 7, 86, 768])
def test_the_error_bound_holds_where_all_roundings_add_up(d_in, share):
    x = torch.full((2, d_in), 1 + share)
    x[1] *= -1
    for scale in torch.linspace(1, 2, 40):  # so that some product lies halfway between two bfloat16 numbers
        weights = Weights(scale * torch.full((d_in, 3), 1 + share), torch.zeros(3), torch.zeros(3, d_in), None)
        assert largest_error(x, weights) <= 1


def test_norms_are_never_rounded_down():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-44, 1e-30, 1e-12, 1.0, 1e18, 1e30):
        matrix = torch.randn(300, 5, generator=generator) * scale
        norms = column_norms(matrix)
        assert (norms >= matrix.double().norm(dim=0)).all()
        assert (norms <= matrix.double().norm(dim=0) * (1 + 1e-4) + 1e-17).all()


@pytest.mark.parametrize("what", ["x", "W_enc", "b_enc", "product", "nan"])
def test_the_full_scan_is_taken_where_something_could_overflow(scans, what):
    generator = torch.Generator().manual_seed(0)
    x, weights = random_case(generator, 20, 9, 60, kinds=("norms",))
    tensors = {"x": x, "W_enc": weights.W_enc, "b_enc": weights.b_enc}
    for exponent, overflows in ((100, False), (125, True)):
        if what == "product":
            x[0], weights.W_enc[:, 0] = 2.0 ** (exponent // 2), 2.0 ** (exponent // 2)
        elif what == "nan":
            weights.W_enc[0, 0] = torch.nan if overflows else 1.0
        else:
            tensors[what][0] = 2.0**exponent
        kept_step(a_batch(x, weights, 2.0, "reduced", 1.0), "kept", NO_DEAD, 0)
        assert any(scans) == overflows


def test_a_bound_that_only_rounded_values_exceed_is_lowered():
    """Extracting enough entries does not suffice: too few of them exceed the bound."""
    x, weights = random_case(torch.Generator().manual_seed(3), 50, 40, 90)
    cutoff = weights.hidden_pre(x).flatten().topk(100).values[-1].item()
    batch = a_batch(x, weights, 2.0, "reduced", 1.002 * cutoff / sae_lens_sampled.step.kept_entries.BOUND_OVER_CUTOFF)
    reduced, full = (kept_step(batch._replace(scan=scan), "kept", NO_DEAD, 0) for scan in ("reduced", "full"))
    assert reduced.cost.n_scans == 2
    assert torch.equal(reduced.kept.latents, full.kept.latents)
    assert reduced.cost.n_extracted > reduced.cost.n_recomputed >= 100


def test_only_what_may_be_kept_is_computed_once_more():
    x, weights = random_case(torch.Generator().manual_seed(3), 50, 40, 90)
    reduced, full = on_both_scans(x, weights, 2.0)
    assert reduced.cost.n_extracted >= full.cost.n_extracted
    assert 100 <= reduced.cost.n_recomputed <= 1.5 * 100
    assert full.cost.n_recomputed == 0


def test_ranks_keep_what_one_process_keeps():
    """One rank has larger inputs, and so most of the kept entries."""
    x, weights = random_case(torch.Generator().manual_seed(5), 60, 30, 80, kinds=("norms",))
    x[:30] *= 3
    batch = a_batch(x, weights, 2.0, "reduced", 1e9)  # the first bound is too high
    whole = kept_step(batch, "kept", NO_DEAD, 0)
    parts = on_ranks(
        lambda rows, ranks: kept_step(batch._replace(x=rows, ranks=ranks), "kept", NO_DEAD, 0), list(x.split(30))
    )
    tokens = torch.cat([30 * rank + part.kept.tokens for rank, part in enumerate(parts)])
    assert torch.equal(tokens, whole.kept.tokens)
    assert torch.equal(torch.cat([part.kept.latents for part in parts]), whole.kept.latents)
    assert torch.equal(torch.cat([part.kept.values for part in parts]), whole.kept.values)
    assert sum(part.cost.n_recomputed for part in parts) == whole.cost.n_recomputed


@pytest.mark.parametrize("fields", [ALL, ALL | {"matryoshka_widths": [20, 90, 200]}], ids=str)
@pytest.mark.parametrize("n_dead", [0, 4, 100])
def test_a_step_is_that_of_the_full_scan(fields, n_dead):
    """In losses, reconstructions and gradients, including AuxK's. Counts for thresholds use rounded activations."""
    outputs = []
    for scan in ("reduced", "full"):
        sae = an_sae(**fields, scan=scan, use_sparse_activations=scan == "reduced")
        step(sae, activations(70, seed=1), n_dead)
        outputs.append((sae, step(sae, activations(70, seed=2), n_dead, 1)))
    reduced, full = outputs
    assert reduced[0].scan_record["recomputed_per_kept"] >= 1
    assert full[0].scan_record["recomputed_per_kept"] == 0
    peaks = [sae.rate_matcher.peak for sae, _ in outputs]
    torch.testing.assert_close(*peaks, rtol=0.02, atol=0)
    for sae, _ in outputs:
        sae.rate_matcher = None
    assert_equal_steps(reduced, full)


@pytest.mark.parametrize("group_size", [None, 16])
def test_in_a_smaller_pool_the_kept_entries_are_float32s_own(monkeypatch, group_size):
    monkeypatch.setattr(sae_lens_sampled.step.kept_entries, "MAX_COLUMNS_SHARE", 0)
    x, weights = random_case(torch.Generator().manual_seed(7), 70, 30, 90)
    batch = a_batch(x, weights, 2.0, "reduced", pool_factor=8.0, pool_group_size=group_size)
    got = kept_step(batch, "kept", NO_DEAD, 0)
    want = keep_top_entries(weights.hidden_pre(x).relu(), got.pool, batch.n_keep, group_size)
    assert len(got.kept.values) == batch.n_keep
    torch.testing.assert_close(want[got.kept.tokens, got.kept.latents], got.kept.values)


def test_auto_scans_in_float32_where_the_margin_would_extract_most(scans):
    """Biases cancel nearly all of a large product."""
    x, weights = random_case(torch.Generator().manual_seed(7), 70, 300, 90)
    x, b_enc = x + 20, -weights.W_enc.sum(dim=0) * 20
    for scan in ("reduced", "auto"):
        kept_step(a_batch(x, weights._replace(b_enc=b_enc), 2.0, scan), "kept", NO_DEAD, 0)
        assert any(scans) == (scan == "auto")


def chosen(scan="auto", n_tokens=2048, dtype=torch.float32, d_in=768, **fields):
    return choose_scan(scan, all_latents(4, 512, **fields), n_tokens, torch.zeros(d_in, 512, dtype=dtype))


def test_auto_is_reduced_for_large_products_of_all_latents_on_a_processor_for_it(monkeypatch):
    for has_instructions in (True, False):
        monkeypatch.setattr(
            sae_lens_sampled.step.reduced_scan, "has_bfloat16_instructions", lambda has=has_instructions: has
        )
        assert chosen() == ("auto" if has_instructions else "full")
        assert chosen("reduced") == chosen("reduced", pool_factor=4.0) == "reduced"
        others = ({"n_tokens": 32}, {"d_in": 64}, {"pool_factor": 4.0}, {"scan": "full"}, {"dtype": torch.float64})
        assert {chosen(**other) for other in others} == {"full"}
        assert chosen("reduced", dtype=torch.bfloat16) == "full"
        with torch.autocast("cpu", torch.bfloat16):
            assert chosen() == chosen("reduced") == "full"


def test_the_log_says_which_scan(caplog):
    sae = an_sae(**ALL, scan="reduced")
    with caplog.at_level("INFO", logger="sae_lens"):
        for _ in range(2):
            step(sae, activations(70))
    [line] = [record.message for record in caplog.records if "path" in record.message]
    assert line.endswith("take the path 'kept', with a scan in bfloat16 where possible and kept values in float32")


def test_another_scan_is_refused():
    with pytest.raises(ValueError, match="scan='fast' must be one of auto, full, reduced"):
        SampledTopKTrainingSAEConfig(d_in=D_IN, d_sae=200, k=3, scan="fast")
