"""One pass over all pre-activations, without gradients, in chunks of columns that stay in the cache.

It scores the latents, counts how often they exceed their thresholds, and extracts the entries above a bound. If the
bound is below the cutoff, only these can be kept, so the (tokens, d_sae) matrix is never stored.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_sampled.step.chunks import chunk_length
from sae_lens_sampled.step.ranks import ALONE, Ranks
from sae_lens_sampled.step.reduced_scan import ReducedProduct, Scan
from sae_lens_sampled.step.scores import ColumnSums, column_sums, is_mergeable, sketch_scores
from sae_lens_sampled.step.selection import ColumnStatistics, PoolFields, column_statistics, joined, merged_statistics
from sae_lens_sampled.step.sparse_codes import Entries, Weights
from sae_lens_sampled.step.triton import SUMS_OF_SCORE, available

MAX_EXTRACTED_SHARE = 0.25
"""Largest share of all entries to extract. If more exceed the bound, the extraction is given up: it would take as long
as a second scan with the pools known (measured at 2,048 tokens, d_sae 8,192, groups of 16 and factor 2, where 37 %
exceed it)."""
DEAD_BYTES = 256 * 2**20
"""Largest size in bytes, as float32, of the dead latents' pre-activations that a scan returns; larger ones are computed
again."""


class Batch(NamedTuple):
    """Inputs and settings of a step's selection."""

    x: Float[Tensor, "tokens d_in"]
    """The encoder's inputs; with several ranks, those of this rank."""
    weights: Weights
    """Encoder and decoder weights of all latents."""
    threshold: Float[Tensor, " d_sae"]
    """The latents' thresholds, in units of the (rescaled) pre-activations."""
    cfg: PoolFields
    """How to choose the pool and how much to keep, and the nested levels."""
    draw: Int[Tensor, ""]
    """Index of the random draw, if the pool is sampled."""
    last_cutoff: Float[Tensor, ""]
    """Smallest positive activation kept in the latest batch that kept any; 0 if unknown."""
    ranks: Ranks = ALONE
    """The processes that share the batch; all take the same path."""
    scan: Scan = "full"
    """Whether the scan for kept entries may run in bfloat16, as returned by `choose_scan`."""

    @property
    def n_keep(self) -> int:
        """Number of entries to keep over all ranks."""
        return int(self.cfg.k * self.ranks.n_of_all(len(self.x)))

    @property
    def by_kernels(self) -> bool:
        """Whether kernels do the scan; the host then waits at most once per scan, after all of it is queued."""
        has_score = self.cfg.n_candidates == self.cfg.d_sae or self.cfg.score in SUMS_OF_SCORE
        return has_score and self.x.dtype != torch.float64 and available(self.x.device)


class ColumnScan(NamedTuple):
    """Per-latent results of a batch, and the entries above the bound."""

    statistics: ColumnStatistics | None
    """Statistics to choose the pool from; None if every latent is a candidate."""
    n_fired: Int[Tensor, " d_sae"]
    """Number of tokens with a pre-activation above the latent's threshold."""
    peak: Float[Tensor, " d_sae"]
    """Largest activation of each latent; over all ranks if the statistics are."""
    dead_pre: Float[Tensor, "n_dead tokens"] | None
    """Pre-activations of the dead latents; None if not requested, too large, or left out by a reduced scan."""
    extracted: "Extracted | None"
    """None without a bound. If too many entries exceed it, this is None too or, with kernels, `inside` returns None."""


class Extracted:
    """Entries above a bound, ordered by latent and then by token, in one part per chunk of latents."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens, self.n_entries = n_tokens, 0
        self.parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, acts: Float[Tensor, "latents tokens"], above: Bool[Tensor, "latents tokens"], first: int) -> None:
        """Add the entries of consecutive latents, starting with latent `first`."""
        places = flat_places(above)
        self.parts.append((first, acts.flatten().index_select(0, places), places))
        self.n_entries += len(places)

    def inside(self, member: Bool[Tensor, "groups d_sae"] | None, group_size: int) -> Entries | None:
        """Entries whose latent is a member in their group of tokens; all entries if `member` is None.

        Each token's entries ascend by latent. None if more entries exceeded the bound than could be stored.
        """
        parts = []
        for first, values, places in self.parts:
            latents, tokens = first + places.div(self.n_tokens, rounding_mode="floor"), places % self.n_tokens
            entries = Entries(values, tokens, latents)
            if member is not None:
                cells = tokens.div(group_size, rounding_mode="floor") * member.shape[1] + latents
                entries = entries.at(member.flatten().index_select(0, cells).nonzero()[:, 0])
            parts.append(entries)
        return Entries(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def flat_places(mask: Bool[Tensor, "latents tokens"]) -> Int[Tensor, " true"]:
    """Flat indices of the True entries, ascending."""
    flat = mask.flatten()
    if flat.device.type != "cpu" or len(flat) % 8:
        return flat.nonzero()[:, 0]
    # Eight flags at a time, hardly any of them True: takes a third of the time.
    words = flat.view(torch.int64)
    some = words.nonzero()[:, 0]
    word, byte = words[some].view(torch.bool).view(-1, 8).nonzero().unbind(1)
    return some[word] * 8 + byte


@torch.no_grad()
def scan_columns(
    batch: Batch,
    dead: Int[Tensor, " n_dead"] | None = None,
    bound: Float[Tensor, ""] | None = None,
    member: Bool[Tensor, "groups d_sae"] | None = None,
    reduced: ReducedProduct | None = None,
) -> ColumnScan:
    """Score every latent, count the tokens above its threshold, and extract the entries above the bound.

    The statistics of one pool, and the peaks with them, are over all ranks; everything else is over this rank's tokens.

    Args:
        batch: inputs and settings; the score must go by columns or be "ridge_leverage" with one pool, unless every
            latent is a candidate.
        dead: ascending indices of latents whose pre-activations to return.
        bound: extract entries above this; given up if too many exceed it. None: extract nothing.
        member: the latents to extract from in each group of tokens; None for all.
        reduced: the product in bfloat16; None for the full one. With it, all entries that may exceed the bound are
            extracted, with rounded values; all other results are from rounded values too, and `dead_pre` is None.
    """
    if batch.by_kernels:
        from sae_lens_sampled.step.kernel_scan import scan_by_kernels

        return scan_by_kernels(batch, dead, bound, member)
    x, weights, threshold, cfg = batch.x, batch.weights, batch.threshold, batch.cfg
    # The sums of one pool are merged over ranks before scoring; those of groups are scored while in the cache.
    merges = cfg.pool_group_size is None and is_mergeable(cfg.score)
    n_fired, peaks, statistics, extracted, dead_pre, n_seen = [], [], [], Extracted(len(x)), None, 0
    max_extracted = MAX_EXTRACTED_SHARE * len(x) * cfg.d_sae
    if dead is not None and reduced is None and 4 * len(dead) * len(x) <= DEAD_BYTES:
        dead_pre = x.new_empty(len(dead), len(x), dtype=weights.b_enc.dtype)
    for part, hidden_pre in _chunks(x, weights) if reduced is None else reduced.chunks():
        # Before `relu_` overwrites the pre-activations: unlike thresholds, entries for AuxK may be negative.
        flags = torch.empty_like(hidden_pre)  # 1 and 0: torch writes floats faster than booleans
        fired = torch.gt(hidden_pre, threshold[part, None], out=flags)
        n_fired.append(fired.sum(dim=1, dtype=torch.float32).int())
        if dead is not None and dead_pre is not None:
            here = dead[(dead >= part.start) & (dead < part.stop)] - part.start
            torch.index_select(hidden_pre, 0, here, out=dead_pre[n_seen : n_seen + len(here)])
            n_seen += len(here)
        # Checked before adding, so at most one chunk's entries exceed the limit.
        if bound is not None and extracted.n_entries <= max_extracted:
            if reduced is None:  # not `gt`: NaN, from broken weights, must reach the loss
                above = torch.le(hidden_pre, bound, out=flags).bool().logical_not_()
            else:
                above = reduced.may_exceed(bound, hidden_pre, part, out=flags)
            if member is not None:
                above &= member[:, part].T.repeat_interleave(cfg.pool_group_size or len(x), dim=1)[:, : len(x)]
            extracted.add(hidden_pre, above, part.start)
        peaks.append(hidden_pre.amax(dim=1).relu_())
        if cfg.n_candidates < cfg.d_sae:
            acts = hidden_pre.relu_()
            if merges:
                statistics.append(column_sums(acts.T[None], cfg.score, batch.last_cutoff))
            else:
                statistics.append(
                    column_statistics(acts.T, cfg.score, cfg.n_candidates, cfg.pool_group_size, batch.last_cutoff)
                )
    pooled, peak = None, torch.cat(peaks)
    if statistics and merges:
        pooled, peak = pool_statistics(batch, statistics)
    elif statistics:
        pooled = joined(statistics, dim=-1)
    too_many = bound is None or extracted.n_entries > max_extracted
    return ColumnScan(pooled, torch.cat(n_fired), peak, dead_pre, None if too_many else extracted)


def pool_statistics(batch: Batch, chunks: list[ColumnSums]) -> tuple[ColumnStatistics, Float[Tensor, " d_sae"]]:
    """Statistics and largest activations over all ranks, from the sums of all chunks of latents."""
    x, weights, cfg, ranks = batch.x, batch.weights, batch.cfg, batch.ranks
    sums = tuple(torch.cat(parts, dim=-1) for parts in zip(*(chunk.sums for chunk in chunks), strict=True))
    whole = ColumnSums(len(x), torch.cat([chunk.peak for chunk in chunks], dim=-1), sums)
    pooled, peak = merged_statistics(whole, cfg.score, ranks)
    if cfg.score == "ridge_leverage":  # needs all columns at once, but only a few rows
        scores = sketch_scores(
            lambda rows: weights.hidden_pre(x[rows]).relu(), len(x), cfg.n_candidates, x.device, ranks
        )
        pooled = pooled._replace(scores=scores[None])
    return pooled, peak[0]


def _chunks(x: Tensor, weights: Weights) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations by chunk of latents, shape (latents, tokens): each latent's are contiguous, fast to reduce."""
    x_t = x.T.contiguous()
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # autocast leaves float64 alone
        x_t = x_t.to(torch.get_autocast_dtype(x.device.type))  # once, not for every chunk
    d_sae, width = len(weights.b_enc), chunk_length(len(x), x.device)
    for start in range(0, d_sae, width):
        part = slice(start, min(start + width, d_sae))
        here = weights.of(part)
        hidden_pre = here.W_enc.T @ x_t + here.b_enc[:, None]
        yield part, hidden_pre if here.norms is None else hidden_pre.mul_(here.norms[:, None])
