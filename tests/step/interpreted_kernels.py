"""Kernels compared with their definitions in torch, in Triton's interpreter; `test_triton.py` runs this file."""

import pytest
import torch
from interpreter import places_of, watched_launch

from sae_lens_sampled.step.triton import dots as dots_module
from sae_lens_sampled.step.triton import row_sums as row_sums_module
from sae_lens_sampled.step.triton import scan as scan_module
from sae_lens_sampled.step.triton.dots import _dot_kernel, dots, plain_dots
from sae_lens_sampled.step.triton.row_sums import _part_kernel, _segment_kernel, plain_row_sums, row_sums
from sae_lens_sampled.step.triton.scan import (
    Above,
    Buffers,
    Chunk,
    Dead,
    TileSums,
    _sum_kernel,
    extract,
    plain_extract,
    plain_hidden_pre,
    plain_sums,
    sum_tiles,
)
from sae_lens_sampled.step.triton.tiles import Tiles

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = list(zip([1, 37, 300], DTYPES, strict=True))
GUARD = 64


def guarded(x):
    """A copy with NaN or an invalid index on both sides, so that reads out of bounds show in the results."""
    bad = torch.nan if x.dtype.is_floating_point else True if x.dtype == torch.bool else 10**8
    memory = torch.full((x.numel() + 2 * GUARD,), bad, dtype=x.dtype)
    inside = memory[GUARD : GUARD + x.numel()].view(x.shape)
    return inside.copy_(x)


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    for module in (dots_module, row_sums_module, scan_module):
        monkeypatch.setattr(module, "launch", watched_launch)


@pytest.fixture(autouse=True)
def _guarded_results(monkeypatch):
    """Detect writes outside the results."""
    empty, memories = torch.empty, []

    def guarded_empty(*shape, dtype=torch.float32, device=None):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        memory = torch.full((shape.numel() + 2 * GUARD,), 77, dtype=dtype)
        memories.append(memory)
        return memory[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield
    monkeypatch.setattr(torch, "empty", empty)
    for memory in memories:
        assert (memory[:GUARD] == 77).all()
        assert (memory[-GUARD:] == 77).all()


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(row_sums_module, "PART_LENGTH", 8)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(("width", "dtype"), WIDTHS)
@pytest.mark.parametrize("lengths", [[1], [0], [3, 0, 0, 1], [8, 9, 7], [0, 41, 2, 16, 0], [17]], ids=str)
def test_row_sums(lengths, width, dtype):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows, matrix = guarded(torch.randint(0, 6, (sum(lengths),))), guarded(torch.randn(6, width).to(dtype))
    values = guarded(torch.randn(len(rows)).to(dtype))
    got = row_sums(values, rows, guarded(starts), matrix)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain_row_sums(values, rows, starts, matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("short_parts")
def test_row_sums_keep_nan_in_its_segment():
    starts, rows = torch.tensor([0, 20, 23, 25]), torch.arange(25)
    matrix = torch.randn(25, 7)
    matrix[4] = torch.nan
    got = row_sums(torch.ones(25), rows, starts, matrix)
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()


@pytest.mark.parametrize(("width", "dtype"), WIDTHS)
@pytest.mark.parametrize("n_entries", [0, 1, 16, 35])
def test_dots(n_entries, width, dtype):
    rows, others = guarded(torch.randint(0, 5, (n_entries,))), guarded(torch.randint(0, 9, (n_entries,)))
    matrix, other = guarded(torch.randn(5, width)), guarded(torch.randn(9, width).to(dtype))
    got = dots(rows, others, matrix, other)
    torch.testing.assert_close(got, plain_dots(rows, others, matrix, other), rtol=1e-5, atol=1e-5)


def drawn_chunk(n_tokens, n_latents, dtype=torch.float32, norms=True, first=0):
    """Integers, so that many pre-activations equal thresholds, bounds and each other, and sums are exact."""
    whole = torch.randint(-3, 4, (n_tokens, n_latents)).to(dtype)
    b_enc, threshold = torch.randint(-1, 2, (n_latents,)).to(dtype), torch.randint(0, 4, (n_latents,)).float()
    of_norms = guarded(torch.randint(0, 3, (n_latents,)).float()) if norms else None
    return Chunk(guarded(whole), first, guarded(b_enc), of_norms, guarded(threshold))


def assert_equal_sums(got, want):
    assert torch.equal(got.n_fired, want.n_fired)
    torch.testing.assert_close(got.peak, want.peak, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.sums, want.sums, rtol=1e-5, atol=1e-6, equal_nan=True)


SIZES = [(1, 1), (70, 16), (9, 1), (150, 70), (150, 150)]
"""Number of tokens, and size of a group."""


@pytest.mark.parametrize("which", ["none", "squares", "shares", "counts", "clipped"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_of_tiles(sizes, which):
    n_latents = 1 if sizes == (150, 150) else 70  # a tile has at most 64 or 256 of them
    tiles, chunk = Tiles(*sizes), drawn_chunk(sizes[0], n_latents, norms=which != "shares")
    chunk = chunk._replace(last_cutoff=torch.tensor(2.0))
    out = TileSums.empty(tiles, n_latents, which, CPU)
    sum_tiles(chunk, tiles, out)
    assert_equal_sums(out, plain_sums(chunk, tiles, which))


@pytest.mark.parametrize("last_cutoff", [0.0, 0.5, 4.0])
def test_sums_of_clipped_squares(last_cutoff):
    tiles, chunk = Tiles(70, 16), drawn_chunk(70, 20)._replace(last_cutoff=torch.tensor(last_cutoff))
    chunk.products[30, 7] = torch.nan
    out = TileSums.empty(tiles, 20, "clipped", CPU)
    sum_tiles(chunk, tiles, out)
    assert_equal_sums(out, plain_sums(chunk, tiles, "clipped"))
    assert torch.equal(*out.sums.nan_to_num()) == (last_cutoff == 0)
    assert out.sums[1].isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_sums_of_any_type_are_in_float32(dtype, scale):
    tiles, chunk = Tiles(70, 16), drawn_chunk(70, 20)
    products = guarded((torch.randn(70, 20) * scale).to(dtype))
    chunk = chunk._replace(products=products, b_enc=guarded((torch.randn(20) * scale).to(dtype)))
    out = TileSums.empty(tiles, 20, "shares", CPU)
    sum_tiles(chunk, tiles, out)
    assert_equal_sums(out, plain_sums(chunk, tiles, "shares"))


def test_sums_of_nan_and_of_nothing():
    tiles, chunk = Tiles(70, 21), drawn_chunk(70, 20)
    chunk.products[30, 7] = torch.nan
    chunk.products[:, 11] = -100.0
    out = TileSums.empty(tiles, 20, "shares", CPU)
    sum_tiles(chunk, tiles, out)
    assert_equal_sums(out, plain_sums(chunk, tiles, "shares"))
    assert out.peak[:, 7].isnan().tolist() == [False, True, False, False]
    assert (out.sums[:, :, 11] == 0).all()


def test_sums_go_into_some_columns_of_the_results():
    tiles, chunk, out = Tiles(70, 16), drawn_chunk(70, 20), TileSums.empty(Tiles(70, 16), 50, "shares", CPU)
    sum_tiles(chunk, tiles, out.of(slice(13, 33)))
    assert_equal_sums(out.of(slice(13, 33)), plain_sums(chunk, tiles, "shares"))
    assert (out.peak[:, :13] == 77).all()
    assert (out.sums[:, :, 33:] == 77).all()


def test_dead_latents_pre_activations():
    tiles, chunk = Tiles(70, 16), drawn_chunk(70, 20)
    dead = torch.tensor([0, 3, 4, 19])
    slots = torch.full((20,), -1, dtype=torch.int32)
    slots[dead] = torch.arange(1, 5, dtype=torch.int32)  # the first slot belongs to another chunk
    of_dead = torch.empty(70, 6)
    sum_tiles(chunk, tiles, TileSums.empty(tiles, 20, "none", CPU), dead=Dead(guarded(slots), of_dead))
    assert torch.equal(of_dead[:, 1:5], plain_hidden_pre(chunk)[:, dead])
    assert (of_dead[:, [0, 5]] == 77).all()


def extracted(chunks, tiles, above, capacity):
    buffers = Buffers(*map(guarded, Buffers.empty(capacity, CPU)))
    n = torch.tensor(0)
    for chunk, of_chunk in zip(chunks, above, strict=True):
        n_latents = chunk.products.shape[1]
        counts = sum_tiles(chunk, tiles, TileSums.empty(tiles, n_latents, "none", CPU), of_chunk)
        n = extract(chunk, tiles, of_chunk, counts, n, buffers)
    return buffers, int(n)


@pytest.mark.parametrize(("bound", "with_member"), [(0.0, False), (2.0, True), (torch.inf, False)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_extraction_of_all_chunks_in_order(sizes, bound, with_member):
    tiles, first, chunks, above = Tiles(*sizes), 5, [], []
    for n_latents in (1, 70, 30):
        chunks.append(drawn_chunk(sizes[0], n_latents, first=first))
        member = guarded(torch.rand(tiles.n_groups, n_latents) < 0.5) if with_member else None
        above.append(Above(torch.tensor(bound), member))
        first += n_latents
    chunks[1].products[-1, -1] = torch.nan
    parts = [plain_extract(chunk, tiles, of_chunk) for chunk, of_chunk in zip(chunks, above, strict=True)]
    want = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    got, n = extracted(chunks, tiles, above, 30_000)
    assert n == len(want[0])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine[:n], theirs, rtol=0, atol=0, equal_nan=True)
        assert (mine[n:] == 0).all()
    by_token = got.tokens[:n].argsort(stable=True)
    token, latent = got.tokens[:n][by_token], got.latents[:n][by_token]
    assert ((token[1:] > token[:-1]) | (latent[1:] > latent[:-1])).all()


@pytest.mark.parametrize("capacity", [0, 1, 99])
def test_full_buffers_take_no_more_and_tell_how_many_there_were(capacity):
    tiles, chunks = Tiles(70, 16), [drawn_chunk(70, 30), drawn_chunk(70, 30, first=30)]
    above = [Above(torch.tensor(0.0), None)] * 2
    everything, n = extracted(chunks, tiles, above, 30_000)
    buffers, n_found = extracted(chunks, tiles, above, capacity)
    assert n_found == n > 99
    for mine, theirs in zip(buffers, everything, strict=True):
        assert torch.equal(mine, theirs[:capacity])
        memory = mine._base
        assert memory is not None
        assert (memory[GUARD + capacity :] == 10**8).all() or memory[GUARD + capacity :].isnan().all()


def test_rows_beyond_two_to_the_31():
    one, far, base, width = torch.ones(1), torch.tensor([2**20]), torch.zeros(1), 2**12
    want = [2**32 + column for column in range(16)]
    starts, out, out_too = torch.tensor([0, 1]), torch.zeros(width), torch.zeros(width)
    of_part = (one, far, starts[:1], starts[1:], base, out, width, 1, 16)
    assert places_of(_part_kernel, of_part, base) == want
    of_segment = (one, far, starts, torch.tensor([0, 0]), base, out, out_too, width, 8, 1, 16)
    assert places_of(_segment_kernel, of_segment, base) == want
    numbers = torch.tensor([2**20, 2**20 + 1])
    of_parts = (one, far, torch.tensor([0, 9]), numbers, out, base, out_too, width, 8, 1, 16)
    assert places_of(_segment_kernel, of_parts, base) == want
    here, other = torch.tensor([0]), torch.zeros(width)
    for arguments in ((far, here, base, other), (here, far, other, base)):
        places = places_of(_dot_kernel, (*arguments, torch.zeros(1), 1, width, 1, width), base)
        assert places == [2**32 + column for column in range(width)]


FAR = 2**31 + 2**20
"""Beyond the range of int32."""


def test_tiles_beyond_two_to_the_31():
    """Later tokens, groups, tiles and sums are addressed correctly where offsets exceed int32 (strides of `FAR`)."""
    zeros, ints, base = torch.zeros(4), torch.zeros(8, dtype=torch.int32), torch.zeros(1)
    given = {
        "products": torch.ones(4, 4), "b_enc": zeros, "norms": None, "bound": zeros[0],
        "member": torch.ones(8, dtype=torch.bool), "member_stride": 4,
        "n_tokens": 4, "n_latents": 4, "group_size": 2, "per_group": 1, "threshold": zeros,
        "last_cutoff": zeros[0], "slots": torch.arange(4, dtype=torch.int32), "dead_pre": torch.zeros(16), "n_dead": 4,
        "n_fired": ints, "peak": torch.zeros(8), "sums": torch.zeros(24), "counts": ints,
        "stride": 4, "sums_stride": 8, "WHICH": "shares", "BT": 4, "BL": 4,
    }  # fmt: skip

    def rows(base=base, **changes):
        places = places_of(_sum_kernel, list((given | changes).values()), base, n_programs=2)
        assert all(place % FAR < 8 for place in places)
        return sorted({place // FAR for place in places})

    assert rows(dead_pre=base, n_dead=FAR) == [0, 1, 2, 3]
    assert rows(n_fired=base.view(torch.int32), peak=base, sums=base, stride=FAR, sums_stride=0) == [0, 1]
    assert rows(sums=base, sums_stride=FAR) == [0, 1, 2]
    assert rows(sums=base, sums_stride=FAR, WHICH="clipped") == [0, 1]
    members = torch.zeros(1, dtype=torch.bool)
    assert rows(members, member=members, member_stride=FAR) == [0, 1]
