"""The two stages of Sampled-SAE (arXiv 2508.21324): a candidate pool from scores, then BatchTopK inside it.

One pool for the whole batch means one group; with `pool_group_size=g`, every g consecutive tokens are a group with its
own pool, and the last group may be shorter. The cutoff is batch-wide in both cases.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_sampled.step.ranks import ALONE, Ranks
from sae_lens_sampled.step.scores import (
    SCORES,
    ColumnScore,
    ColumnSums,
    column_score,
    column_sums,
    l2_norm,
    score_of,
    sketch_scores,
)
from sae_lens_sampled.step.triton import available

PoolSampling = Literal["top", "proportional"]


@dataclass(kw_only=True)
class PoolFields:
    """
    The config fields of the selection and the nested levels; a mixin for SAELens' configs, which have `k` and `d_sae`.

    Args:
        pool_factor (float | None): Candidate pool size divided by k, at least 1 (the paper's l). None (inf
            on the command line), or at least d_sae / k: every latent is a candidate, which is BatchTopK.
        pool_steps (int | None): Number of training steps after which every latent is a candidate, whatever
            `pool_factor` is: training goes on as BatchTopK, to which the export's thresholds adapt. None: never.
        score (str): How latents are scored over a batch: l2_norm, squared_l2, entropy, perplexity, frequency,
            winsorised, ridge_leverage, uniform, or a name given to register_score.
        pool_sampling (Literal["top", "proportional"]): "top" takes the best-scored latents. "proportional" draws them
            without replacement, with probability proportional to the score.
        pool_group_size (int | None): Number of consecutive tokens that share a pool. None: one pool per batch, as in
            the paper. Groups of 1 with pool_factor=1, score="l2_norm" and an integer k are per-token TopK.
        pool_seed (int): Seed of proportional sampling. The random numbers of a step depend only on this seed and the
            number of training steps so far, so a resumed run repeats its draws.
        matryoshka_widths (list[int] | None): Increasing widths of nested levels, the last one d_sae. For each inner
            width w, the first w latents have their own reconstruction loss, as in SAELens' Matryoshka SAE, from the
            same kept activations. None, or only d_sae: no levels.
    """

    pool_factor: float | None = 5.0
    pool_steps: int | None = None
    score: str = "l2_norm"
    pool_sampling: PoolSampling = "top"
    pool_group_size: int | None = None
    pool_seed: int = 0
    matryoshka_widths: list[int] | None = None

    if TYPE_CHECKING:
        k: float
        d_sae: int

    @property
    def n_candidates(self) -> int:
        """Size m of each pool."""
        return count_candidates(self.k, self.pool_factor, self.d_sae)

    def fields_after(self, n_steps: int) -> "PoolFields":
        """The fields in use after `n_steps` training steps: from `pool_steps` on, every latent is a candidate."""
        if self.pool_steps is None or n_steps < self.pool_steps:
            return self
        fields = copy.copy(self)
        fields.pool_factor = fields.pool_steps = None
        return fields

    @property
    def inner_widths(self) -> list[int]:
        """Widths of the levels smaller than the whole dictionary, each of which has its own loss."""
        return (self.matryoshka_widths or [])[:-1]


class ColumnStatistics(NamedTuple):
    """Statistics of each latent over a batch, per group: all that the pool is chosen from, besides random draws."""

    scores: Float[Tensor, "groups d_sae"]
    norms: Float[Tensor, "groups d_sae"]
    """L2 norms; of latents with equal scores, the one with the larger norm is preferred."""
    alive: Bool[Tensor, "groups d_sae"]
    """Whether the latent has a positive activation."""


def sampled_topk(
    acts: Float[Tensor, "tokens d_sae"],
    cfg: PoolFields,
    draw: Int[Tensor, ""],
    last_cutoff: Float[Tensor, ""] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Float[Tensor, "tokens d_sae"], Int[Tensor, "groups n_candidates"]]:
    """Run both stages; returns the activations, with 0 for those not kept, and the pools.

    Args:
        acts: non-negative activations.
        cfg: how to choose the pool and how much to keep.
        draw: index of the random draw, if the pool is sampled.
        last_cutoff: smallest positive activation kept in the previous batch, for scores; None or 0 if unknown.
        ranks: the processes that share the batch; `acts` are this process's, and all must call this.
    """
    statistics = column_statistics(acts.detach(), cfg.score, cfg.n_candidates, cfg.pool_group_size, last_cutoff, ranks)
    pool = choose_pool(statistics, cfg, draw, ranks)
    n_keep = int(cfg.k * ranks.n_of_all(len(acts)))
    return keep_top_entries(acts, pool, n_keep, cfg.pool_group_size, ranks), pool


def choose_pool(
    statistics: ColumnStatistics, cfg: PoolFields, draw: Int[Tensor, ""], ranks: Ranks = ALONE
) -> Int[Tensor, "groups n_candidates"]:
    """Stage one: the pools, from the statistics of a batch; arguments as in `sampled_topk`."""
    if cfg.pool_sampling == "proportional":
        first_group = 0 if cfg.pool_group_size is None else ranks.rank * len(statistics.scores)
        statistics = perturb_scores(statistics, cfg.pool_seed, draw, first_group)
    return candidate_pool(statistics, cfg.n_candidates)


def count_candidates(k: float, pool_factor: float | None, d_sae: int) -> int:
    """Size m of the pool: `k * pool_factor` rounded, at least k; d_sae if the factor is None or `d_sae / k` or more."""
    if pool_factor is None or pool_factor >= d_sae / k:
        return d_sae
    return min(max(math.ceil(k), round(k * pool_factor)), d_sae)


@torch.no_grad()
def column_statistics(
    acts: Float[Tensor, "tokens d_sae"],
    score: str,
    n_candidates: int,
    group_size: int | None,
    last_cutoff: Float[Tensor, ""] | None = None,
    ranks: Ranks = ALONE,
) -> ColumnStatistics:
    """Score, norm and liveness of every latent in every group, at least in float32.

    Args:
        acts: non-negative activations.
        score: a key of `SCORES`.
        n_candidates: size m of the pool.
        group_size: tokens that share a pool; None for the whole batch.
        last_cutoff: see `sampled_topk`.
        ranks: the processes that share the batch; `acts` are this process's, and only the whole batch spans several.
    """
    parts = []
    for groups in _in_groups(acts, group_size):
        sums = column_sums(groups, score, last_cutoff)
        part = statistics_of(sums, score) if group_size is not None else merged_statistics(sums, score, ranks)[0]
        if score == "ridge_leverage" and group_size is None:
            sketched = sketch_scores(lambda rows: acts[rows], len(acts), n_candidates, acts.device, ranks)
            part = part._replace(scores=sketched[None])
        elif not isinstance(SCORES[score], ColumnScore):
            part = part._replace(scores=score_of(groups, score, n_candidates))
        parts.append(part)
    return joined(parts, dim=0)


def joined(parts: Sequence[ColumnStatistics], dim: int) -> ColumnStatistics:
    """Statistics of several sets of groups (`dim` 0) or of latents (-1), as of one."""
    scores, alive = (torch.cat([part[i] for part in parts], dim) for i in (0, 2))
    if all(part.norms is part.scores for part in parts):
        return ColumnStatistics(scores, scores, alive)
    return ColumnStatistics(scores, torch.cat([part.norms for part in parts], dim), alive)


def merged_statistics(
    sums: ColumnSums, score: str, ranks: Ranks
) -> tuple[ColumnStatistics, Float[Tensor, "groups d_sae"]]:
    """Statistics for one pool and the largest activations, over all ranks; `sums` are those of this rank."""
    merged = column_score(score).merged(sums, ranks)
    return statistics_of(merged, score), merged.peak


def statistics_of(sums: ColumnSums, score: str) -> ColumnStatistics:
    """Statistics from sums over all tokens of each group; norms stand in for scores that are not a `ColumnScore`."""
    norms, of_score = l2_norm.of(sums), column_score(score)
    return ColumnStatistics(norms if of_score is l2_norm else of_score.of(sums), norms, sums.peak > 0)


@torch.no_grad()
def candidate_pool(statistics: ColumnStatistics, n_candidates: int) -> Int[Tensor, "groups n_candidates"]:
    """Indices of the best-scored latents of each group, in ascending order.

    Latents that are not alive or have a NaN score rank last. Ties go to the larger norm, then to the lower index.
    """
    # A stable sort of all latents is slow, so find the m-th largest value, take all above it, and let the next
    # criterion choose among those equal to it. The number still missing stays on the device.
    # NaN, from broken weights, has no order. It ranks last: all indices stay valid, and a pool of NaN gives a NaN loss.
    scores = statistics.scores.masked_fill(~statistics.alive | statistics.scores.isnan(), -torch.inf)
    on_host = scores.device.type == "cpu" and not available(scores.device)  # elsewhere the host would have to wait
    if on_host and n_candidates < scores.shape[1]:
        best, latents = scores.topk(n_candidates + 1, dim=1)
        if (best[:, -2] > best[:, -1]).all():  # no ties to break
            return latents[:, :-1].sort(dim=1).values
    above, equal = _split_at_rank(scores, n_candidates)
    norms = statistics.norms.nan_to_num(0, torch.inf).masked_fill(~equal, -torch.inf).masked_fill(above, torch.inf)
    above, equal = _split_at_rank(norms, n_candidates)
    missing = n_candidates - above.sum(dim=1, keepdim=True)
    chosen_by_index = equal & (equal.cumsum(dim=1) <= missing)
    return _mask_to_indices(above | chosen_by_index, n_candidates)


def perturb_scores(
    statistics: ColumnStatistics, seed: int, draw: Int[Tensor, ""], first_group: int = 0
) -> ColumnStatistics:
    """Scores whose m largest are a random sample without replacement, with probability proportional to the given ones.

    Gumbel-top-m: log(score + 2^-126) plus Gumbel noise (Kool et al., arXiv 1903.06059). Negative scores count as 0. The
    noise is a function of (seed, draw, group, latent), the same on every device up to rounding; `draw` is the index of
    the draw and stays a tensor, to avoid waiting for the device. `first_group` is the index of the first group; other
    ranks' may precede it.
    """
    scores = statistics.scores.double()
    log_scores = (scores.clamp(min=0) + torch.finfo(torch.float32).tiny).log()
    n_groups, d_sae = scores.shape
    return statistics._replace(scores=log_scores + gumbel_noise(seed, draw, n_groups, d_sae, first_group))


def gumbel_noise(
    seed: int, draw: Int[Tensor, ""], n_groups: int, d_sae: int, first_group: int = 0
) -> Float[Tensor, "groups d_sae"]:
    """Standard Gumbel noise, float64, as a function of (seed, draw, group, latent)."""
    groups = torch.arange(first_group, first_group + n_groups, device=draw.device)[:, None]
    latents = torch.arange(d_sae, device=draw.device)
    bits = _hash32(_hash32(_hash32(_hash32(torch.full_like(draw, seed)) ^ draw) ^ groups) ^ latents)
    uniform = (bits.double() + 0.5) / 2**32
    return -(-uniform.log()).log()


def keep_top_entries(
    acts: Float[Tensor, "tokens d_sae"],
    pool: Int[Tensor, "groups n_candidates"],
    n_keep: int,
    group_size: int | None = None,
    ranks: Ranks = ALONE,
) -> Float[Tensor, "tokens d_sae"]:
    """BatchTopK among the candidates: the `n_keep` largest entries of pooled latents stay, all others become 0.

    `n_keep` counts all ranks. If there are fewer candidate entries, all stay. The gradient reaches kept entries only.
    """
    columns = pool.repeat_interleave(group_size or len(acts), dim=0)[: len(acts)]
    candidates = acts.gather(1, columns)
    indices = ranks.topk_indices(candidates.detach(), n_keep)
    values = candidates.flatten().gather(0, indices)
    kept = torch.zeros_like(candidates).flatten().scatter(0, indices, values).view_as(candidates)
    return torch.zeros_like(acts).scatter(1, columns, kept)


def _in_groups(acts: Tensor, group_size: int | None) -> Iterator[Tensor]:
    """Views of shape (groups, tokens, d_sae): all full groups at once, then the last group if it is shorter."""
    if group_size is None:
        yield acts[None]
        return
    n_whole = len(acts) // group_size * group_size
    if n_whole:
        yield acts[:n_whole].unflatten(0, (-1, group_size))
    if n_whole < len(acts):
        yield acts[n_whole:][None]


def _split_at_rank(keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Masks, per row of a (rows, n) matrix, of the keys above the `rank`-th largest one and of those equal to it."""
    cutoff = keys.topk(rank, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    return keys > cutoff, keys == cutoff


def _mask_to_indices(mask: Tensor, n_true: int) -> Tensor:
    """Ascending column indices of the True entries of a (rows, n) mask that has `n_true` of them in every row.

    Unlike with `nonzero`, the shape does not depend on the data, so there is no wait for the GPU.
    """
    n_rows, n_columns = mask.shape
    # The last of the n_true + 1 slots collects all entries that are not chosen.
    slot = torch.where(mask, mask.cumsum(dim=1) - 1, n_true)
    columns = torch.arange(n_columns, device=mask.device).expand(n_rows, -1)
    return slot.new_empty(n_rows, n_true + 1).scatter_(1, slot, columns)[:, :n_true]


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer mixer in int64; constants below 2^31 keep every product inside int64.

    "lowbias32" with the constants found by TheIronBorn (github.com/skeeto/hash-prospector, issue 19).
    """
    x = x & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
