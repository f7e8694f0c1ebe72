"""One pass over all pre-activations, a chunk of columns at a time that stays in the cache, without gradients.

It scores the latents, counts what their thresholds need, and extracts the entries above a bound, which are all that may
be kept if the bound is below the cutoff. So the (tokens, d_sae) matrix is never stored.
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
from sae_lens_sampled.step.selection import ColumnStatistics, PoolFields, column_statistics, merged_statistics
from sae_lens_sampled.step.sparse_codes import Entries, Weights
from sae_lens_sampled.step.triton import SUMS_OF_SCORE, available

MAX_EXTRACTED_SHARE = 0.25
"""Share of all entries above the bound, from which on none are extracted: more of them take as long as a second scan
with the pools known (2,048 tokens, d_sae 8,192, groups of 16 at factor 2, where 37 % exceed it)."""
DEAD_BYTES = 256 * 2**20
"""Pre-activations of dead latents that a scan passes on; where they are more they are computed a second time."""


class Batch(NamedTuple):
    """What a step selects from, and how."""

    x: Float[Tensor, "tokens d_in"]
    """The encoder's inputs; on several ranks this one's."""
    weights: Weights
    """What encodes and decodes all latents."""
    threshold: Float[Tensor, " d_sae"]
    """The latents' thresholds, in units of the (rescaled) pre-activations."""
    cfg: PoolFields
    """How to choose the pool."""
    draw: Int[Tensor, ""]
    """Number of the random draw, if the pool is sampled."""
    last_cutoff: Float[Tensor, ""]
    """The smallest activation that the batch before kept; 0 where it is not known."""
    ranks: Ranks = ALONE
    """The processes that share the batch; all of them take the same path."""
    scan: Scan = "full"
    """Whether the scan for kept entries is in bfloat16, as `choose_scan` says."""

    @property
    def n_keep(self) -> int:
        """Entries to keep, of all ranks together."""
        return int(self.cfg.k * self.ranks.n_of_all(len(self.x)))

    @property
    def by_kernels(self) -> bool:
        """Whether kernels do the scan, with which the host waits for the device once, after all of it is queued."""
        has_score = self.cfg.n_candidates == self.cfg.d_sae or self.cfg.score in SUMS_OF_SCORE
        return has_score and self.x.dtype != torch.float64 and available(self.x.device)


class ColumnScan(NamedTuple):
    """What a batch tells about every latent, and the entries above the bound."""

    statistics: ColumnStatistics | None
    """What the pool is chosen from; None if every latent is a candidate."""
    n_fired: Int[Tensor, " d_sae"]
    """Tokens with a pre-activation above the latent's threshold."""
    peak: Float[Tensor, " d_sae"]
    """Largest activation; of all ranks where the statistics are."""
    dead_pre: Float[Tensor, "n_dead tokens"] | None
    """Pre-activations of the dead latents; None if they are too many."""
    extracted: "Extracted | None"
    """None if there was no bound, or too much above it."""


class Extracted:
    """Entries above a bound, by latent and then by token; in the parts that chunks gave, which stay in the cache."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens, self.n_entries = n_tokens, 0
        self.parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, acts: Float[Tensor, "latents tokens"], above: Bool[Tensor, "latents tokens"], first: int) -> None:
        """Those of some latents, of which `first` is the first."""
        places = flat_places(above)
        self.parts.append((first, acts.flatten().index_select(0, places), places))
        self.n_entries += len(places)

    def inside(self, member: Bool[Tensor, "groups d_sae"] | None, group_size: int) -> Entries | None:
        """Those that lie in the latents that are members in their group of tokens; None for all.

        By latent or by token, and within a token by latent. None if more were above the bound than could be taken.
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
    # Eight at a time, hardly any of which is True: a third of the time.
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
    """Score every latent, count where it exceeds its threshold, and extract what exceeds the bound.

    The statistics of one pool are those of all ranks, everything else is of this one's tokens.

    Args:
        batch: its score goes by columns, or is "ridge_leverage" with one pool.
        dead: latents, ascending, whose pre-activations are wanted.
        bound: what entries to be extracted exceed; where it lies too low the extraction is given up. None: no entries.
        member: the latents to extract from in each group of tokens; None for all.
        reduced: the product in bfloat16. What is extracted is then what may exceed the bound, in rounded values, and
            everything else is of rounded values too; pre-activations of dead latents are left out.
    """
    if batch.by_kernels:
        from sae_lens_sampled.step.kernel_scan import scan_by_kernels

        return scan_by_kernels(batch, dead, bound, member)
    x, weights, threshold, cfg = batch.x, batch.weights, batch.threshold, batch.cfg
    # The sums of one pool are merged over ranks before they are scores; those of groups are scored in the cache.
    merges = cfg.pool_group_size is None and is_mergeable(cfg.score)
    n_fired, peaks, statistics, extracted, dead_pre, n_seen = [], [], [], Extracted(len(x)), None, 0
    max_extracted = MAX_EXTRACTED_SHARE * len(x) * cfg.d_sae
    if dead is not None and reduced is None and 4 * len(dead) * len(x) <= DEAD_BYTES:
        dead_pre = x.new_empty(len(dead), len(x), dtype=weights.b_enc.dtype)
    for part, hidden_pre in _chunks(x, weights) if reduced is None else reduced.chunks():
        # Before `relu_`, which writes over the pre-activations: thresholds are never negative, but AuxK's entries are.
        flags = torch.empty_like(hidden_pre)  # 1 and 0: torch writes numbers faster than truth values
        fired = torch.gt(hidden_pre, threshold[part, None], out=flags)
        n_fired.append(fired.sum(dim=1, dtype=torch.float32).int())
        if dead is not None and dead_pre is not None:
            here = dead[(dead >= part.start) & (dead < part.stop)] - part.start
            torch.index_select(hidden_pre, 0, here, out=dead_pre[n_seen : n_seen + len(here)])
            n_seen += len(here)
        # Counted before adding, so at most one chunk's entries are too many.
        if bound is not None and extracted.n_entries <= max_extracted:
            if reduced is None:  # NaN, of broken weights, is not below: it must reach the loss
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
        pooled = ColumnStatistics(*(torch.cat(parts, dim=-1) for parts in zip(*statistics, strict=True)))
    too_many = bound is None or extracted.n_entries > max_extracted
    return ColumnScan(pooled, torch.cat(n_fired), peak, dead_pre, None if too_many else extracted)


def pool_statistics(batch: Batch, chunks: list[ColumnSums]) -> tuple[ColumnStatistics, Float[Tensor, " d_sae"]]:
    """Statistics and largest activations over all ranks, from the sums of all chunks of latents."""
    x, weights, cfg, ranks = batch.x, batch.weights, batch.cfg, batch.ranks
    sums = tuple(torch.cat(parts, dim=-1) for parts in zip(*(chunk.sums for chunk in chunks), strict=True))
    whole = ColumnSums(len(x), torch.cat([chunk.peak for chunk in chunks], dim=-1), sums)
    pooled, peak = merged_statistics(whole, cfg.score, ranks)
    if cfg.score == "ridge_leverage":  # needs all columns at once, but of a few rows only
        scores = sketch_scores(
            lambda rows: weights.hidden_pre(x[rows]).relu(), len(x), cfg.n_candidates, x.device, ranks
        )
        pooled = pooled._replace(scores=scores[None])
    return pooled, peak[0]


def _chunks(x: Tensor, weights: Weights) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations of some latents, shape (latents, tokens): so a latent's lie together, and reducing is fast."""
    x_t = x.T.contiguous()
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves as it is
        x_t = x_t.to(torch.get_autocast_dtype(x.device.type))  # once, not for every chunk
    d_sae, width = len(weights.b_enc), chunk_length(len(x), x.device)
    for start in range(0, d_sae, width):
        part = slice(start, min(start + width, d_sae))
        here = weights.of(part)
        hidden_pre = here.W_enc.T @ x_t + here.b_enc[:, None]
        yield part, hidden_pre if here.norms is None else hidden_pre.mul_(here.norms[:, None])
