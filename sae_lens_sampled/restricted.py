"""The training step on the pooled columns alone: the numbers of the dense path without its (tokens, d_sae) matrix.

Every entry that is kept lies in one of the m pooled columns, so only these need gradients. What the other columns are
needed for, to be scored and to have their thresholds matched, are a few sums each: one pass computes them a chunk of
columns at a time, without gradients, while the chunk is in the cache (`scan_columns`). Of the five products of size
tokens x d_in x d_sae in a BatchTopK step one remains.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_sampled.scores import sketch_rows
from sae_lens_sampled.selection import (
    ColumnStatistics,
    PoolFields,
    choose_pool,
    column_statistics,
    pool_size,
    score_of,
    top_entries,
)

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Pre-activations that `scan_columns` holds at a time; other devices as "cuda". On a CPU what stays in the cache: at
2048 tokens chunks of 256 to 1024 latents take the same time, 2048 a fifth more."""


@runtime_checkable
class RestrictedFields(PoolFields, Protocol):
    """The config fields that the restricted pass depends on."""

    rescale_acts_by_decoder_norm: bool


class ColumnScan(NamedTuple):
    """What a batch tells about every latent."""

    statistics: ColumnStatistics
    n_fired: Int[Tensor, " d_sae"]
    """Tokens with a pre-activation above the latent's threshold."""
    peak: Float[Tensor, " d_sae"]
    """Largest activation."""


class Kept(NamedTuple):
    """The entries that BatchTopK keeps among the candidates."""

    acts: Float[Tensor, "tokens n_candidates"]
    """All candidates with those that are not kept set to 0; carries the gradient."""
    values: Float[Tensor, " n_keep"]
    """The kept ones, by token and then by latent; some are 0 if there were too few positive ones. No gradient."""
    tokens: Int[Tensor, " n_keep"]
    latents: Int[Tensor, " n_keep"]


class Restricted(NamedTuple):
    """One forward pass on the pooled columns."""

    reconstruction: Float[Tensor, "tokens d_in"]
    """Without the decoder's bias; carries the gradient."""
    pool: Int[Tensor, "groups n_candidates"]
    kept: Kept
    scan: ColumnScan


def reconstruct(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    threshold: Float[Tensor, " d_sae"],
    cfg: RestrictedFields,
    draw: Int[Tensor, ""],
) -> Restricted:
    """Scan all columns, choose the pool, and encode, select and decode with the pooled columns.

    Args:
        x: the encoder's inputs.
        W_enc: encoder weights.
        b_enc: encoder bias.
        W_dec: decoder weights.
        threshold: the latents' thresholds, in units of the (rescaled) pre-activations.
        cfg: how to choose the pool, and whether decoder norms rescale the pre-activations.
        draw: number of the random draw, if the pool is sampled.
    """
    norms = W_dec.norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else None
    group_size, n_candidates = cfg.pool_group_size, pool_size(cfg.k, cfg.pool_factor, cfg.d_sae)
    scan = scan_columns(x, W_enc, b_enc, norms, threshold, cfg.score, n_candidates, group_size)
    pool = choose_pool(scan.statistics, cfg, draw)
    acts = candidates(x, W_enc, b_enc, norms, pool, group_size)
    kept = keep_top(acts, pool, int(cfg.k * len(x)), group_size)
    return Restricted(decode(kept.acts, W_dec, norms, pool, group_size), pool, kept, scan)


@torch.no_grad()
def scan_columns(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    norms: Float[Tensor, " d_sae"] | None,
    threshold: Float[Tensor, " d_sae"],
    score: str,
    n_candidates: int,
    group_size: int | None,
) -> ColumnScan:
    """Score every latent, and count where it exceeds its threshold, from one chunk of columns after the other.

    Args:
        x: the encoder's inputs.
        W_enc: encoder weights.
        b_enc: encoder bias.
        norms: decoder norms, where these rescale the pre-activations.
        threshold: the latents' thresholds, in units of the (rescaled) pre-activations.
        score: a key of `SCORES` that judges each column by itself, or "ridge_leverage" with one pool.
        n_candidates: size m of the pool.
        group_size: tokens that share a pool; None for the whole batch.
    """
    x_t = x.T.contiguous()  # so a latent's pre-activations lie together, and reducing them is fast
    by_sketch = score == "ridge_leverage"
    parts, width = [], chunk_width(x)
    for start in range(0, W_enc.shape[1], width):
        part = slice(start, start + width)
        hidden_pre = _rescale(W_enc[:, part].T @ x_t + b_enc[part, None], norms, part)
        n_fired = (hidden_pre > threshold[part, None]).sum(dim=1, dtype=torch.int32)
        acts = hidden_pre.relu_().T
        statistics = column_statistics(acts, "l2_norm" if by_sketch else score, n_candidates, group_size)
        parts.append((statistics, n_fired, acts.amax(dim=0)))
    all_statistics, n_fired, peak = zip(*parts, strict=True)
    statistics = ColumnStatistics(*(torch.cat(columns, dim=1) for columns in zip(*all_statistics, strict=True)))
    if by_sketch:  # needs all columns at once, but of a few rows only
        sketch = x[sketch_rows(len(x), x.device)]
        acts = _rescale((sketch @ W_enc + b_enc).T, norms, slice(None)).relu_().T
        statistics = statistics._replace(scores=score_of(acts[None], score, n_candidates))
    return ColumnScan(statistics, torch.cat(n_fired), torch.cat(peak))


def candidates(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    norms: Float[Tensor, " d_sae"] | None,
    pool: Int[Tensor, "groups n_candidates"],
    group_size: int | None,
) -> Float[Tensor, "tokens n_candidates"]:
    """Activations of the pooled columns, token by token those of its group's pool, with gradient."""
    latents = pool.flatten()
    weights, bias = W_enc.index_select(1, latents), b_enc[latents].view(pool.shape)
    scale = None if norms is None else norms[latents].view(pool.shape)
    if len(pool) == 1:
        hidden_pre = x @ weights + bias
        return (hidden_pre if scale is None else hidden_pre * scale).relu()
    groups = _in_groups(x, len(pool), group_size)
    hidden_pre = groups @ weights.view(len(W_enc), *pool.shape).transpose(0, 1) + bias[:, None]
    hidden_pre = hidden_pre if scale is None else hidden_pre * scale[:, None]
    return hidden_pre.relu().flatten(end_dim=1)[: len(x)]


def keep_top(
    acts: Float[Tensor, "tokens n_candidates"],
    pool: Int[Tensor, "groups n_candidates"],
    n_keep: int,
    group_size: int | None,
) -> Kept:
    """The `n_keep` largest candidates of the batch, or all if there are fewer."""
    indices = top_entries(acts, min(n_keep, acts.numel()))
    values = acts.flatten().gather(0, indices)
    kept = torch.zeros_like(acts).flatten().scatter(0, indices, values).view_as(acts)
    indices = indices.sort().values
    tokens = indices // acts.shape[1]
    groups = torch.zeros_like(tokens) if len(pool) == 1 else tokens // (group_size or len(acts))
    latents = pool[groups, indices % acts.shape[1]]
    return Kept(kept, kept.detach().flatten()[indices], tokens, latents)


def decode(
    acts: Float[Tensor, "tokens n_candidates"],
    W_dec: Float[Tensor, "d_sae d_in"],
    norms: Float[Tensor, " d_sae"] | None,
    pool: Int[Tensor, "groups n_candidates"],
    group_size: int | None,
) -> Float[Tensor, "tokens d_in"]:
    """The reconstruction from the pooled columns, without the decoder's bias, with gradient."""
    latents = pool.flatten()
    rows = W_dec.index_select(0, latents)
    scale = None if norms is None else (1 / norms[latents]).view(pool.shape)
    if len(pool) == 1:
        return (acts if scale is None else acts * scale) @ rows
    groups = _in_groups(acts, len(pool), group_size)
    groups = groups if scale is None else groups * scale[:, None]
    return (groups @ rows.view(*pool.shape, -1)).flatten(end_dim=1)[: len(acts)]


def as_coo(kept: Kept, shape: torch.Size) -> Tensor:
    """The kept activations as a coalesced COO tensor of the given shape (..., d_sae), without gradient."""
    leading, rest = [], kept.tokens  # torch.unravel_index would copy the shape to the device, and wait for it
    for size in reversed(shape[:-1]):
        leading.insert(0, rest % size)
        rest = rest // size
    # Their order is that of a coalesced tensor already: by token, and the pool of a token is in ascending order.
    return torch.sparse_coo_tensor(
        torch.stack([*leading, kept.latents]), kept.values, shape, is_coalesced=True, check_invariants=False
    )


def chunk_width(x: Tensor) -> int:
    """Columns whose pre-activations on all rows of `x` are held at a time; at least 64."""
    budget = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"])
    return max(64, budget // (4 * len(x)))


def _rescale(hidden_pre: Tensor, norms: Tensor | None, part: slice) -> Tensor:
    """Times the decoder norms, if there are any; `hidden_pre` has shape (columns, tokens)."""
    return hidden_pre if norms is None else hidden_pre * norms[part, None]


def _in_groups(x: Tensor, n_groups: int, group_size: int | None) -> Tensor:
    """Shape (groups, tokens of a group, columns); the last group is filled up with zeros."""
    n_tokens = n_groups * (group_size or len(x))
    return torch.nn.functional.pad(x, (0, 0, 0, n_tokens - len(x))).view(n_groups, -1, x.shape[1])
