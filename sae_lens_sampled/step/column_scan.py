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
from sae_lens_sampled.step.rank_statistics import ColumnSums, column_sums, sketch_scores
from sae_lens_sampled.step.ranks import ALONE, Ranks
from sae_lens_sampled.step.scores import sketch_rows
from sae_lens_sampled.step.selection import (
    ColumnStatistics,
    PoolFields,
    column_statistics,
    merged_column_statistics,
    score_of,
)
from sae_lens_sampled.step.sparse_codes import Entries, Weights

MAX_EXTRACTED_SHARE = 0.25
"""Share of all entries above the bound, from which on none are extracted: more of them take as long as a second scan
with the pools known (2,048 tokens, d_sae 8,192, groups of 16 at factor 2, where 37 % exceed it)."""
DEAD_BYTES = 256 * 2**20
"""Pre-activations of dead latents that a scan passes on; where they are more they are computed a second time."""


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
        places = above.flatten().nonzero()[:, 0]
        self.parts.append((first, acts.flatten().index_select(0, places), places))
        self.n_entries += len(places)

    def inside(self, member: Bool[Tensor, "groups d_sae"] | None, group_size: int) -> Entries:
        """Those that lie in the latents that are members in their group of tokens; None for all."""
        parts = []
        for first, values, places in self.parts:
            latents, tokens = first + places.div(self.n_tokens, rounding_mode="floor"), places % self.n_tokens
            entries = Entries(values, tokens, latents)
            if member is not None:
                cells = tokens.div(group_size, rounding_mode="floor") * member.shape[1] + latents
                entries = entries.at(member.flatten().index_select(0, cells).nonzero()[:, 0])
            parts.append(entries)
        return Entries(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.no_grad()
def scan_columns(
    x: Float[Tensor, "tokens d_in"],
    weights: Weights,
    threshold: Float[Tensor, " d_sae"],
    cfg: PoolFields,
    dead: Int[Tensor, " n_dead"] | None,
    bound: Float[Tensor, ""] | None = None,
    member: Bool[Tensor, "groups d_sae"] | None = None,
    ranks: Ranks = ALONE,
) -> ColumnScan:
    """Score every latent, count where it exceeds its threshold, and extract what exceeds the bound.

    `threshold` is in units of the (rescaled) pre-activations; the score judges each column by itself, or is
    "ridge_leverage" with one pool; `dead` are latents, ascending, whose pre-activations are wanted; extraction is of
    latents that are `member` in their group of tokens (None: of all), and given up where the bound lies too low. The
    statistics of one pool are those of all `ranks`, everything else is of this one's tokens.
    """
    by_sketch, merged = cfg.score == "ridge_leverage", ranks.count > 1 and cfg.pool_group_size is None
    n_fired, peaks, statistics, extracted, dead_pre, n_seen = [], [], [], Extracted(len(x)), None, 0
    max_extracted = MAX_EXTRACTED_SHARE * len(x) * cfg.d_sae
    if dead is not None and 4 * len(dead) * len(x) <= DEAD_BYTES:
        dead_pre = x.new_empty(len(dead), len(x), dtype=weights.b_enc.dtype)
    for part, hidden_pre in _chunks(x, weights):
        n_fired.append((hidden_pre > threshold[part, None]).sum(dim=1, dtype=torch.int32))
        if dead is not None and dead_pre is not None:
            here = dead[(dead >= part.start) & (dead < part.stop)] - part.start
            torch.index_select(hidden_pre, 0, here, out=dead_pre[n_seen : n_seen + len(here)])
            n_seen += len(here)
        acts = hidden_pre.relu_()
        peaks.append(acts.amax(dim=1))
        if cfg.n_candidates < cfg.d_sae:
            score = "l2_norm" if by_sketch else cfg.score
            if merged:
                statistics.append(column_sums(acts.T, score))
            else:
                statistics.append(column_statistics(acts.T, score, cfg.n_candidates, cfg.pool_group_size))
        if bound is not None and extracted.n_entries <= max_extracted:
            above = ~(acts <= bound)  # NaN, of broken weights, is not below: it must reach the loss
            if member is not None:
                above &= member[:, part].T.repeat_interleave(cfg.pool_group_size or len(x), dim=1)[:, : len(x)]
            extracted.add(acts, above, part.start)
    pooled, peak = None, torch.cat(peaks)
    columns = [torch.cat(parts, dim=-1) for parts in zip(*statistics, strict=True)]
    if columns and merged:
        pooled, peak = merged_column_statistics(ColumnSums(*columns), cfg.score, len(x), ranks)
    elif columns:
        pooled = ColumnStatistics(*columns)
    if pooled is not None and by_sketch:  # needs all columns at once, but of a few rows only
        pooled = pooled._replace(scores=_sketch_scores(x, weights, cfg, ranks if merged else ALONE)[None])
    too_many = bound is None or extracted.n_entries > max_extracted
    return ColumnScan(pooled, torch.cat(n_fired), peak, dead_pre, None if too_many else extracted)


def _sketch_scores(x: Tensor, weights: Weights, cfg: PoolFields, ranks: Ranks) -> Float[Tensor, " d_sae"]:
    """`ridge_leverage`, of one pool."""
    if ranks.count > 1:
        return sketch_scores(lambda rows: weights.hidden_pre(x[rows]).relu(), len(x), cfg.n_candidates, x.device, ranks)
    sketch = weights.hidden_pre(x[sketch_rows(len(x), x.device)]).relu()
    return score_of(sketch[None], cfg.score, cfg.n_candidates)[0]


def _chunks(x: Tensor, weights: Weights) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations of some latents, shape (latents, tokens): so a latent's lie together, and reducing is fast."""
    x_t = x.T.contiguous()
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves as it is
        x_t = x_t.to(torch.get_autocast_dtype(x.device.type))  # once, not for every chunk
    d_sae, width = len(weights.b_enc), chunk_length(len(x), x.device)
    for start in range(0, d_sae, width):
        part = slice(start, min(start + width, d_sae))
        hidden_pre = weights.W_enc[:, part].T @ x_t + weights.b_enc[part, None]
        yield part, hidden_pre if weights.norms is None else hidden_pre.mul_(weights.norms[part, None])
