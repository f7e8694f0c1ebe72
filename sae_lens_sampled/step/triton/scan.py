"""Kernels for a chunk of pre-activations: sums over tokens per latent, and entries above a bound in a fixed order.

Each program handles a tile of tokens and latents. The tokens of a tile are in one group, so sums over a group's tiles
are sums over the group. Entries to extract are counted per tile, and the cumulative sum of the counts says where each
tile writes its entries: no atomics, no waiting for the device, and the same order in every run.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_sampled.step.scores import frequency, l2_norm, perplexity, winsorised
from sae_lens_sampled.step.triton import Sums
from sae_lens_sampled.step.triton.launch import launch, n_blocks, offset
from sae_lens_sampled.step.triton.tiles import Tiles

N_SUMS: dict[Sums, int] = {"none": 0, "squares": 1, "shares": 3, "counts": 2, "clipped": 2}


class Chunk(NamedTuple):
    """The columns of x W_enc for some latents, and the other parameters of these latents."""

    products: Float[Tensor, "tokens latents"]
    """Product of inputs and encoder weights, of any floating-point dtype; everything else is added in float32."""
    first: int
    """Index of the first latent."""
    b_enc: Float[Tensor, " latents"]
    norms: Float[Tensor, " latents"] | None
    threshold: Float[Tensor, " latents"]
    last_cutoff: Float[Tensor, ""] | None = None
    """Smallest positive activation kept in the previous batch; 0 if unknown. For sums of clipped squares."""


class TileSums(NamedTuple):
    """Sums of each latent over the tokens of each tile."""

    n_fired: Int[Tensor, "tiles latents"]
    """Number of tokens with a pre-activation above the latent's threshold."""
    peak: Float[Tensor, "tiles latents"]
    """Largest activation, at least 0; NaN if any is."""
    sums: Float[Tensor, "sums tiles latents"]
    """Sums over tokens: of squares, then those of the score; shares are relative to the tile's own peak."""
    which: Sums

    @staticmethod
    def empty(tiles: Tiles, n_latents: int, which: Sums, device: torch.device) -> "TileSums":
        """Uninitialised sums, to be written into."""
        shape = (tiles.n_tiles, n_latents)
        n_fired = torch.empty(shape, dtype=torch.int32, device=device)
        sums = torch.empty(N_SUMS[which], *shape, device=device)
        return TileSums(n_fired, torch.empty(shape, device=device), sums, which)

    def of(self, latents: slice) -> "TileSums":
        """Views of the sums of some latents."""
        return TileSums(self.n_fired[:, latents], self.peak[:, latents], self.sums[..., latents], self.which)


class Above(NamedTuple):
    """Which entries are extracted: all except those at or below a bound, so NaN too."""

    bound: Float[Tensor, ""]
    """Non-negative."""
    member: Bool[Tensor, "groups latents"] | None
    """The latents to extract from in each group of tokens; None for all."""


class Dead(NamedTuple):
    """Output for the pre-activations of dead latents."""

    slots: Int[Tensor, " latents"]
    """Column of each latent, int32; negative for latents that are not dead."""
    hidden_pre: Float[Tensor, "tokens n_dead"]
    """To be written into."""


class Buffers(NamedTuple):
    """Output for extracted entries; those beyond the capacity are dropped."""

    values: Float[Tensor, " capacity"]
    tokens: Int[Tensor, " capacity"]
    latents: Int[Tensor, " capacity"]

    @staticmethod
    def empty(capacity: int, device: torch.device) -> "Buffers":
        """Buffers of zeros, so that all indices are valid."""
        tokens, latents = torch.zeros(2, capacity, dtype=torch.int32, device=device)
        return Buffers(torch.zeros(capacity, device=device), tokens, latents)


def plain_hidden_pre(chunk: Chunk) -> Float[Tensor, "tokens latents"]:
    """Pre-activations in float32, rescaled by the norms if there are any."""
    hidden_pre = chunk.products.float() + chunk.b_enc.float()
    return hidden_pre if chunk.norms is None else hidden_pre * chunk.norms.float()


def plain_sums(chunk: Chunk, tiles: Tiles, which: Sums) -> TileSums:
    """The definition of the sums that `sum_tiles` writes."""
    hidden_pre, tile_of, n_fired, peaks, sums = plain_hidden_pre(chunk), tiles.of_tokens(chunk.b_enc.device), [], [], []
    for tile in range(tiles.n_tiles):
        pre = hidden_pre[tile_of == tile]
        acts = torch.cat([pre.relu(), torch.zeros_like(hidden_pre[:1])])  # a tile may be empty
        n_fired.append((pre > chunk.threshold).sum(dim=0, dtype=torch.int32))
        peaks.append(acts.amax(dim=0))
        if which == "none":
            sums.append(acts.new_zeros(0, acts.shape[1]))
        else:
            score = {"squares": l2_norm, "shares": perplexity, "counts": frequency, "clipped": winsorised}[which]
            sums.append(torch.stack(score.column_sums(acts, chunk.last_cutoff).sums))
    return TileSums(torch.stack(n_fired), torch.stack(peaks), torch.stack(sums, dim=1), which)


def plain_extract(chunk: Chunk, tiles: Tiles, above: Above) -> Buffers:
    """The definition of what `extract` writes, for empty buffers with room for all entries."""
    acts = plain_hidden_pre(chunk).relu()
    is_above = ~(acts <= above.bound)
    if above.member is not None:
        is_above &= above.member.repeat_interleave(tiles.group_size, dim=0)[: tiles.n_tokens]
    tokens, latents = is_above.nonzero().T
    across = n_blocks(acts.shape[1], tiles.latents)
    order = (tiles.of_tokens(acts.device)[tokens] * across + latents // tiles.latents).argsort(stable=True)
    tokens, latents = tokens[order], latents[order]
    return Buffers(acts[tokens, latents], tokens.int(), (latents + chunk.first).int())


def sum_tiles(
    chunk: Chunk, tiles: Tiles, out: TileSums, above: Above | None = None, dead: Dead | None = None
) -> Int[Tensor, " all_tiles"]:
    """Write the sums of the chunk's tiles into `out`, and the dead latents' pre-activations into `dead`.

    Returns the number of entries to extract from each tile, undefined without `above`; tiles of the same tokens are
    adjacent.
    """
    products, n_latents = chunk.products, chunk.products.shape[1]
    n_across = n_blocks(n_latents, tiles.latents)
    counts = torch.empty(tiles.n_tiles * n_across, dtype=torch.int32, device=products.device)
    launch(
        _sum_kernel, (len(counts),), products.device, *_common(chunk, tiles, above), chunk.threshold, chunk.last_cutoff,
        dead.slots if dead else None, dead.hidden_pre if dead else None, dead.hidden_pre.shape[1] if dead else 0,
        out.n_fired, out.peak, out.sums, counts, out.n_fired.stride(0), out.sums.stride(0),
        out.which, tiles.tokens, tiles.latents,
    )  # fmt: skip
    return counts


def extract(
    chunk: Chunk, tiles: Tiles, above: Above, counts: Int[Tensor, " all_tiles"], n_before: Int[Tensor, ""], out: Buffers
) -> Int[Tensor, ""]:
    """Append the entries above the bound to the `n_before` in `out`; returns their new number, dropped ones included.

    `counts` come from `sum_tiles`. Entries are ordered by tile, token and latent, so a token's ascend by latent.
    """
    ends = counts.cumsum(dim=0) + n_before
    launch(
        _extract_kernel, (len(counts),), chunk.products.device, *_common(chunk, tiles, above), ends - counts,
        *out, len(out.values), chunk.first, tiles.tokens, tiles.latents,
    )  # fmt: skip
    return ends[-1]


def _common(chunk: Chunk, tiles: Tiles, above: Above | None) -> tuple[Tensor | int | None, ...]:
    """Arguments shared by both kernels."""
    bound, member = above or (None, None)
    products, stride = chunk.products, 0 if member is None else member.stride(0)
    sizes = (tiles.n_tokens, products.shape[1], tiles.group_size, tiles.per_group)
    return products, chunk.b_enc, chunk.norms, bound, member, stride, *sizes


@triton.jit
@no_type_check
def _tile(n_tokens, n_latents, group_size, per_group, BT: tl.constexpr, BL: tl.constexpr):
    """A program's tile of tokens, its group, its tokens and latents, and a mask of those that exist."""
    across = tl.cdiv(n_latents, BL)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    group = tile // per_group
    place = (tile % per_group) * BT + tl.arange(0, BT)
    tokens, latents = group * group_size + place, column * BL + tl.arange(0, BL)
    is_token = (place < group_size) & (tokens < n_tokens)
    return tile, group, tokens, latents, is_token[:, None] & (latents < n_latents)[None, :]


@triton.jit
@no_type_check
def _hidden_pre(products, b_enc, norms, tokens, latents, inside, n_latents):
    """Pre-activations of a tile, in float32; 0 outside the mask `inside`."""
    there = latents < n_latents
    pre = tl.load(products + offset(tokens[:, None], latents[None, :], n_latents), mask=inside, other=0.0)
    pre = pre.to(tl.float32) + tl.load(b_enc + latents, mask=there, other=0.0).to(tl.float32)[None, :]
    if norms is not None:
        pre = pre * tl.load(norms + latents, mask=there, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside, pre, 0.0)


@triton.jit
@no_type_check
def _is_above(pre, bound, member, member_stride, group, latents, inside, n_latents):
    """Mask of a tile's entries to extract; before relu, which changes nothing above a non-negative bound."""
    above = inside & ~(pre <= tl.load(bound).to(tl.float32))
    if member is not None:
        is_member = tl.load(member + offset(group, latents, member_stride), mask=latents < n_latents, other=0)
        above = above & (is_member != 0)[None, :]
    return above


@triton.jit
@no_type_check
def _sum_kernel(
    products, b_enc, norms, bound, member, member_stride, n_tokens, n_latents, group_size, per_group,
    threshold, last_cutoff, slots, dead_pre, n_dead, n_fired, peak, sums, counts, stride, sums_stride,
    WHICH: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """One program per tile."""
    tile, group, tokens, latents, inside = _tile(n_tokens, n_latents, group_size, per_group, BT, BL)
    there = latents < n_latents
    pre = _hidden_pre(products, b_enc, norms, tokens, latents, inside, n_latents)
    at = offset(tile, latents, stride)
    limit = tl.load(threshold + latents, mask=there, other=0.0).to(tl.float32)
    tl.store(n_fired + at, tl.sum((inside & (pre > limit[None, :])).to(tl.int32), axis=0), mask=there)
    if slots is not None:
        slot = tl.load(slots + latents, mask=there, other=-1)
        is_dead = inside & (slot >= 0)[None, :]
        tl.store(dead_pre + offset(tokens[:, None], slot[None, :], n_dead), pre, mask=is_dead)
    if bound is not None:
        above = _is_above(pre, bound, member, member_stride, group, latents, inside, n_latents)
        tl.store(counts + tl.program_id(0), tl.sum(tl.sum(above.to(tl.int32), axis=1), axis=0))
    acts = tl.where(pre <= 0, 0.0, pre)  # keeps NaN
    is_nan = tl.max((acts != acts).to(tl.int32), axis=0) > 0
    largest = tl.where(is_nan, float("nan"), tl.max(acts, axis=0))
    tl.store(peak + at, largest, mask=there)
    if WHICH != "none":
        tl.store(sums + at, tl.sum(acts * acts, axis=0), mask=there)
    if WHICH == "shares":
        # Peaks are clamped to the smallest normal number: 0 / 0 would be NaN.
        share = acts / tl.where(largest < 1.1754943508222875e-38, 1.1754943508222875e-38, largest)[None, :]
        logs = share * tl.log(tl.where(share > 0, share, 1.0))
        tl.store(sums + offset(1, at, sums_stride), tl.sum(share, axis=0), mask=there)
        tl.store(sums + offset(2, at, sums_stride), tl.sum(logs, axis=0), mask=there)
    if WHICH == "clipped":
        cutoff = tl.load(last_cutoff).to(tl.float32)
        cutoff = tl.where(cutoff > 0, cutoff, float("inf"))
        clipped = tl.where(acts > cutoff, cutoff, acts)  # keeps NaN
        tl.store(sums + offset(1, at, sums_stride), tl.sum(clipped * clipped, axis=0), mask=there)
    if WHICH == "counts":
        tl.store(sums + offset(1, at, sums_stride), tl.sum((acts > 0).to(tl.float32), axis=0), mask=there)


@triton.jit
@no_type_check
def _extract_kernel(
    products, b_enc, norms, bound, member, member_stride, n_tokens, n_latents, group_size, per_group,
    begins, values, places_token, places_latent, capacity, first_latent, BT: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """One program per tile."""
    _, group, tokens, latents, inside = _tile(n_tokens, n_latents, group_size, per_group, BT, BL)
    pre = _hidden_pre(products, b_enc, norms, tokens, latents, inside, n_latents)
    above = _is_above(pre, bound, member, member_stride, group, latents, inside, n_latents)
    chosen = tl.reshape(above.to(tl.int32), (BT * BL,))
    places = tl.load(begins + tl.program_id(0)) + tl.cumsum(chosen, axis=0) - 1
    mask = (chosen > 0) & (places < capacity)
    all_tokens = tl.broadcast_to(tokens[:, None], (BT, BL))
    all_latents = tl.broadcast_to((latents + first_latent)[None, :], (BT, BL))
    tl.store(values + places, tl.reshape(pre, (BT * BL,)), mask=mask)
    tl.store(places_token + places, tl.reshape(all_tokens, (BT * BL,)), mask=mask)
    tl.store(places_latent + places, tl.reshape(all_latents, (BT * BL,)), mask=mask)
