"""The pass of `column_scan.py` with kernels: torch multiplies chunk by chunk, two kernels do the rest."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from sae_lens_sampled.step import column_scan
from sae_lens_sampled.step.chunks import chunk_length
from sae_lens_sampled.step.column_scan import Batch, ColumnScan, Extracted, pool_statistics
from sae_lens_sampled.step.ranks import Ranks
from sae_lens_sampled.step.scores import ColumnSums, column_score
from sae_lens_sampled.step.selection import ColumnStatistics, statistics_of
from sae_lens_sampled.step.sparse_codes import Entries
from sae_lens_sampled.step.triton import SUMS_OF_SCORE
from sae_lens_sampled.step.triton.scan import Above, Buffers, Chunk, Dead, TileSums, extract, sum_tiles
from sae_lens_sampled.step.triton.tiles import Tiles

MAX_EXTRACTED_PER_KEPT = 16
"""Buffer capacity for extracted entries, per entry to keep: their number is unknown until the scan is over."""
MIN_ROOM = 2**16
"""Smallest buffer capacity, in entries, unless `MAX_EXTRACTED_SHARE` allows fewer."""


class BufferedEntries(Extracted):
    """Entries above a bound, in buffers; their number stays on the device until `inside` waits for it, once."""

    def __init__(self, tiles: Tiles, buffers: Buffers, n_found: Int[Tensor, ""], dtype: torch.dtype) -> None:
        super().__init__(tiles.n_tokens)
        self.buffers, self.n_found, self.dtype = buffers, n_found, dtype

    @override
    def inside(self, member: Bool[Tensor, "groups d_sae"] | None, group_size: int) -> Entries | None:
        (values, tokens, latents), capacity = self.buffers, len(self.buffers.values)
        is_inside, n_inside = None, self.n_found
        if member is not None:
            cells = tokens.long().div(group_size, rounding_mode="floor") * member.shape[1] + latents
            is_inside = member.flatten().index_select(0, cells)
            is_inside &= torch.arange(capacity, device=values.device) < self.n_found
            n_inside = is_inside.sum()
        self.n_entries, n = torch.stack([self.n_found, n_inside]).tolist()
        if self.n_entries > capacity:
            return None
        places = slice(n) if is_inside is None else torch.nonzero_static(is_inside, size=n)[:, 0]
        return Entries(values[places].to(self.dtype), tokens[places].long(), latents[places].long())


@torch.no_grad()
def scan_by_kernels(
    batch: Batch,
    dead: Int[Tensor, " n_dead"] | None,
    bound: Float[Tensor, ""] | None,
    member: Bool[Tensor, "groups d_sae"] | None,
) -> ColumnScan:
    """`scan_columns` with kernels, without waiting for the device (except for "ridge_leverage" on several ranks)."""
    x, cfg, device = batch.x, batch.cfg, batch.x.device
    tiles = Tiles(len(x), min(cfg.pool_group_size or len(x), len(x)))
    which = SUMS_OF_SCORE[cfg.score] if cfg.n_candidates < cfg.d_sae else "none"
    sums, slots, of_dead = TileSums.empty(tiles, cfg.d_sae, which, device), None, None
    if dead is not None and 4 * len(dead) * len(x) <= column_scan.DEAD_BYTES:
        of_dead = torch.empty(len(x), len(dead), device=device)
        slots = torch.full((cfg.d_sae,), -1, dtype=torch.int32, device=device)
        slots.scatter_(0, dead, torch.arange(len(dead), dtype=torch.int32, device=device))
    buffers = Buffers.empty(0 if bound is None else _capacity(batch), device)
    n_found = torch.zeros((), dtype=torch.int64, device=device)
    for part, chunk in _chunks(batch):
        above = None if bound is None else Above(bound, None if member is None else member[:, part])
        of_part = None if slots is None or of_dead is None else Dead(slots[part], of_dead)
        counts = sum_tiles(chunk, tiles, sums.of(part), above, of_part)
        if above is not None:
            n_found = extract(chunk, tiles, above, counts, n_found, buffers)
    pooled, peak = None, sums.peak.amax(dim=0)
    if which != "none" and cfg.pool_group_size is None:
        pooled, peak = pool_statistics(batch, [_sums_of_groups(sums, tiles, cfg.score)])
    elif which != "none":
        pooled = _group_statistics(_sums_of_groups(sums, tiles, cfg.score), tiles, cfg.score)
    dtype = torch.promote_types(_product_dtype(x), batch.weights.b_enc.dtype)
    extracted = None if bound is None else BufferedEntries(tiles, buffers, n_found, dtype)
    n_fired = sums.n_fired.sum(dim=0, dtype=torch.int32)
    return ColumnScan(pooled, n_fired, peak, None if of_dead is None else of_dead.T, extracted)


def _capacity(batch: Batch) -> int:
    most = int(column_scan.MAX_EXTRACTED_SHARE * len(batch.x) * batch.cfg.d_sae)
    return min(most, max(MIN_ROOM, MAX_EXTRACTED_PER_KEPT * int(batch.cfg.k * len(batch.x))))


def _product_dtype(x: Tensor) -> torch.dtype:
    is_cast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype


def _chunks(batch: Batch) -> Iterator[tuple[slice, Chunk]]:
    """Products by chunk of latents, all in the same memory, which stays in the cache."""
    weights, dtype = batch.weights, _product_dtype(batch.x)
    x, d_sae = batch.x.to(dtype).contiguous(), len(batch.weights.b_enc)
    width = chunk_length(len(x), x.device) // 64 * 64  # rows of a chunk of W_enc start at whole vectors
    memory = x.new_empty(len(x) * min(width, d_sae))
    for first in range(0, d_sae, width):
        part = slice(first, min(first + width, d_sae))
        products = memory[: len(x) * (part.stop - first)].view(len(x), -1)
        torch.mm(x, weights.W_enc[:, part].to(dtype), out=products)
        norms = None if weights.norms is None else weights.norms[part]
        yield part, Chunk(products, first, weights.b_enc[part], norms, batch.threshold[part], batch.last_cutoff)


class _TilesOfGroups(Ranks):
    """Merges the tiles of a group (second-to-last dimension) like processes that share a batch."""

    @override
    def sum(self, x: Tensor) -> Tensor:
        return x.sum(dim=-2, keepdim=True)

    @override
    def max(self, x: Tensor) -> Tensor:
        return x.amax(dim=-2, keepdim=True)


def _sums_of_groups(of_tiles: TileSums, tiles: Tiles, score: str) -> ColumnSums:
    peak, *sums = (column.unflatten(0, (-1, tiles.per_group)) for column in (of_tiles.peak, *of_tiles.sums))
    merged = column_score(score).merged(ColumnSums(tiles.group_size, peak, tuple(sums)), _TilesOfGroups())
    return ColumnSums(tiles.group_size, merged.peak[:, 0], tuple(column[:, 0] for column in merged.sums))


def _group_statistics(sums: ColumnSums, tiles: Tiles, score: str) -> ColumnStatistics:
    """Statistics of all groups; the last one may have fewer tokens."""
    last = tiles.n_tokens - (tiles.n_groups - 1) * tiles.group_size
    if last == tiles.group_size:
        return statistics_of(sums, score)
    parts = []
    for groups, n_tokens in ((slice(-1), tiles.group_size), (slice(-1, None), last)):
        of_groups = ColumnSums(n_tokens, sums.peak[groups], tuple(column[groups] for column in sums.sums))
        parts.append(statistics_of(of_groups, score))
    return ColumnStatistics(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
