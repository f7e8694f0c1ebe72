"""The training step on the kept entries: the results of the dense path without its (tokens, d_sae) matrices.

BatchTopK keeps k entries per token on average, and only these have gradients. So one pass over all pre-activations
extracts the entries that may be kept (`column_scan.py`), the kept ones are selected exactly from these, and all else is
products with a sparse matrix of k entries per token (`sparse_codes.py`). Of the six products of size
tokens x d_in x d_sae in a BatchTopK step, one remains for any pool, including that of all latents; if the processor has
bfloat16 instructions, it may run in bfloat16 (`reduced_scan.py`).

If the whole batch shares a single small pool, the cutoff is near 0 and nearly every positive entry exceeds it. In that
case the pooled columns are recomputed with gradient: they contain all entries that can be kept.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_sampled.step.auxiliary import by_entries, dead_entries, dead_reconstruction
from sae_lens_sampled.step.column_scan import Batch, Extracted, scan_columns
from sae_lens_sampled.step.products import has_kernels
from sae_lens_sampled.step.ranks import ALONE, Ranks
from sae_lens_sampled.step.reduced_scan import ReducedProduct, reduced_product
from sae_lens_sampled.step.scores import goes_by_columns
from sae_lens_sampled.step.selection import PoolFields, choose_pool, sampled_topk
from sae_lens_sampled.step.sparse_codes import Entries, encode_and_decode, level_of
from sae_lens_sampled.step.thresholds import StepCounts, count_kept
from sae_lens_sampled.step.triton import available

Step = Literal["auto", "kept", "dense"]
StepPath = Literal["columns", "kept", "dense"]

MAX_COLUMNS_SHARE = 0.08
"""Largest share of latents in one pool for which its columns are computed. This and the next two constants were
measured by `eval/bench/training_step.py` on two CPU cores (its sections crossing_*)."""
MAX_DENSITY = 0.2
"""Largest share of kept entries among all for which sparse products are faster than dense ones."""
MIN_ENTRIES = 2**16
"""Number of entries of the (tokens, d_sae) matrix up to which the dense path is as fast."""
BOUND_OVER_CUTOFF = 0.8
"""Ratio of the extraction's bound to the last batch's cutoff, which hardly ever falls this far between batches. The
benchmark's results and the logs say how many entries exceed the bound and how often a second scan was needed."""
SAMPLE_ROWS = 128
"""Number of tokens from which the cutoff is estimated if the last batch's cannot be used."""


class KeptStep(NamedTuple):
    """Results of one forward pass."""

    reconstructions: Float[Tensor, "levels tokens d_out"]
    """Reconstructions of the inner widths, then the full one; without the decoder bias; they carry the gradient."""
    dead_reconstruction: Float[Tensor, "tokens d_out"] | None
    """From the dead latents only, for AuxK; carries the gradient. None if no latent is dead."""
    kept: Entries
    """The kept activations, ordered by token and then by latent; they carry the gradient. On the path "columns" some
    are 0 if too few are positive."""
    pool: Int[Tensor, "groups n_candidates"] | None
    """None if every latent is a candidate."""
    counts: StepCounts
    cost: "ScanCost"


class ScanCost(NamedTuple):
    """The cost of finding the kept entries."""

    n_scans: int
    n_extracted: int
    """Entries above the bound, over all scans not given up; for a reduced scan, those that may be above it."""
    n_recomputed: int
    """Entries of reduced scans whose values were computed in float32."""


def possible_paths(cfg: PoolFields, device: torch.device) -> list[StepPath]:
    """Possible paths of a step on `device`; the first is the one to prefer, unless `choose_path` finds it too slow."""
    n_candidates, d_sae, one_pool = cfg.n_candidates, cfg.d_sae, cfg.pool_group_size is None
    by_columns = goes_by_columns(cfg.score) or (cfg.score == "ridge_leverage" and one_pool)
    if not (by_columns or n_candidates == d_sae):
        return ["dense"]
    if one_pool and n_candidates <= MAX_COLUMNS_SHARE * d_sae:
        return ["columns", "dense"]
    return ["kept", "dense"] if has_kernels(device) else ["dense"]


def choose_path(cfg: PoolFields, step: Step, n_tokens: int, device: torch.device) -> StepPath:
    """The path of a step: the "columns" of one small pool, the "kept" entries, or "dense".

    "kept" takes the first possible path. "auto" takes the path measured to be fastest on CPUs; on other devices, one
    pool's columns or else "dense". On CUDA, if several are possible, `sae/path_choice.py` times these instead.
    """
    first = possible_paths(cfg, device)[0]
    if step != "auto" or first != "kept":
        return "dense" if step == "dense" else first
    pays = device.type == "cpu" and cfg.k <= MAX_DENSITY * cfg.d_sae and n_tokens * cfg.d_sae > MIN_ENTRIES
    return "kept" if pays else "dense"


def kept_step(batch: Batch, path: StepPath, dead: Int[Tensor, " n_dead"], k_aux: int) -> KeptStep | None:
    """Scan all columns, choose the pool and the entries kept in it, and reconstruct; None if the step must be dense.

    Args:
        batch: inputs and settings of the selection.
        path: "columns" or "kept".
        dead: ascending indices of the dead latents.
        k_aux: number of dead latents that each token keeps for AuxK, at most `len(dead)`.
    """
    x, weights, ranks, cost, bound, reduced = batch.x, batch.weights, batch.ranks, ScanCost(1, 0, 0), None, None
    if path == "kept":
        bound = first_bound(batch)
        reduced = None if batch.by_kernels else reduced_product(x, weights, bound, batch.scan, ranks)
    sparse_aux = by_entries(len(dead), k_aux, x.device)
    passed_on = dead if sparse_aux else None
    scan = scan_columns(batch, passed_on, bound, reduced=reduced)
    pool = None if scan.statistics is None else choose_pool(scan.statistics, batch.cfg, batch.draw, ranks)
    of_dead = None
    if bound is None:
        assert pool is not None
        kept, reconstructions = keep_columns(batch, pool[0])
    else:
        candidates, cost = find_candidates(batch, pool, bound, scan.extracted, reduced)
        if candidates is None:
            return None
        kept = keep_largest(candidates, batch.n_keep, ranks)
        dead_codes = dead_entries(x, weights, dead, scan.dead_pre, k_aux) if sparse_aux else None
        kept, reconstructions, of_dead = encode_and_decode(x, weights, kept, batch.cfg.inner_widths, dead_codes)
    if of_dead is None and len(dead):
        of_dead = dead_reconstruction(x, weights, dead, scan.dead_pre, k_aux)
    counts = count_kept(kept.values, kept.latents, scan.n_fired, scan.peak, batch.threshold)
    return KeptStep(reconstructions, of_dead, kept, pool, counts, cost)


@torch.no_grad()
def first_bound(batch: Batch) -> Float[Tensor, ""]:
    """The bound of a batch's first scan, from the last batch's cutoff if there is one."""
    if batch.by_kernels:  # no read from the device: a bound of infinity extracts nothing, and the batch is rescanned
        return torch.where(batch.last_cutoff > 0, BOUND_OVER_CUTOFF * batch.last_cutoff, torch.inf)
    cutoff = batch.last_cutoff if batch.last_cutoff > 0 else batch.ranks.min(estimate_cutoff(batch))
    return BOUND_OVER_CUTOFF * cutoff


@torch.no_grad()
def find_candidates(
    batch: Batch,
    pool: Int[Tensor, "groups n_candidates"] | None,
    bound: Float[Tensor, ""],
    extracted: Extracted | None,
    reduced: ReducedProduct | None = None,
) -> tuple[Entries | None, ScanCost]:
    """Entries of pooled latents, in the order of `Extracted`: at least the `n_keep` largest, or all positive ones.

    If the scan's bound was too high or too low, the columns are scanned again with the pools known: above a bound
    estimated from this batch and, if that is too high, above 0. The kept entries do not depend on the bound. All ranks
    decide identically. Returns the entries, or None if more exceed the bound than a scan may extract, and the cost.

    Args:
        batch: inputs and settings of the selection.
        pool: the candidates; None for all latents.
        bound: the bound of the scan so far.
        extracted: the entries that this scan extracted; None if they were too many.
        reduced: the product of that scan if it was reduced; rescans are of the same kind.
    """
    x, ranks, candidates, member, cost = batch.x, batch.ranks, None, None, ScanCost(1, 0, 0)
    group_size = batch.cfg.pool_group_size or len(x)
    if pool is not None:
        member = torch.zeros(len(pool), batch.cfg.d_sae, dtype=torch.bool, device=x.device).scatter_(1, pool, True)
    found = None if extracted is None else extracted.inside(member, group_size)
    if not ranks.any(found is None):
        assert extracted is not None
        assert found is not None
        candidates, n_recomputed = _above(bound, found, batch, reduced)
        cost = ScanCost(1, extracted.n_entries, n_recomputed)
        if ranks.total(len(candidates.values)) >= batch.n_keep or bound == 0:
            return candidates, cost
    estimate = BOUND_OVER_CUTOFF * ranks.min(estimate_cutoff(batch))
    for next_bound in (estimate, torch.zeros_like(estimate)):
        if candidates is not None and next_bound >= bound:
            continue  # would find nothing new
        extracted = scan_columns(batch._replace(ranks=ALONE), None, next_bound, member, reduced=reduced).extracted
        cost = cost._replace(n_scans=cost.n_scans + 1)
        found = None if extracted is None else extracted.inside(None, group_size)
        if ranks.any(found is None):
            return None, cost
        assert extracted is not None
        assert found is not None
        candidates, n_recomputed = _above(next_bound, found, batch, reduced)
        cost = ScanCost(cost.n_scans, cost.n_extracted + extracted.n_entries, cost.n_recomputed + n_recomputed)
        if ranks.total(len(candidates.values)) >= batch.n_keep:
            break
    return candidates, cost


def _above(
    bound: Float[Tensor, ""], extracted: Entries, batch: Batch, reduced: ReducedProduct | None
) -> tuple[Entries, int]:
    """The extracted entries that may be kept and do exceed the bound, and how many values were recomputed for that."""
    if reduced is None:
        return extracted, 0
    return reduced.exact(extracted, bound, batch.n_keep, batch.ranks)


@torch.no_grad()
def estimate_cutoff(batch: Batch) -> Float[Tensor, ""]:
    """The cutoff if the first `SAMPLE_ROWS` tokens were the whole batch; 0 if they keep nothing."""
    acts = batch.weights.hidden_pre(batch.x[:SAMPLE_ROWS]).relu()
    kept, _ = sampled_topk(acts, batch.cfg, batch.draw, batch.last_cutoff)
    smallest = torch.where(kept > 0, kept, torch.inf).amin()
    return torch.where(smallest.isfinite(), smallest, 0.0)


@torch.no_grad()
def keep_largest(candidates: Entries, n_keep: int, ranks: Ranks = ALONE) -> Entries:
    """The `n_keep` largest candidates over all ranks, or all if there are fewer, ordered by token and then by latent.

    Ties at the cutoff go to the lowest (token, latent), so the result does not depend on bounds and chunks. NaN ranks
    first, as in `torch.topk`.
    """
    rank = candidates.values.nan_to_num(nan=torch.inf)
    cutoff, n_equal = ranks.cutoff(rank, n_keep)
    # With kernels, the number of entries near the cutoff is not read from the device: that of kept ones is known,
    # except on one of several ranks.
    is_waited_for = ranks.count > 1 or not available(rank.device)
    near = (rank >= cutoff).nonzero()[:, 0] if is_waited_for else torch.arange(len(rank), device=rank.device)
    near = near[candidates.tokens[near].argsort(stable=True)]  # a token's candidates ascend by latent already
    above, equal = rank[near] > cutoff, rank[near] == cutoff
    chosen = above | (equal & (equal.cumsum(dim=0) <= n_equal))
    if is_waited_for:
        return candidates.at(near[chosen])
    return candidates.at(near[torch.nonzero_static(chosen, size=min(n_keep, len(rank)))[:, 0]])


def keep_columns(
    batch: Batch, pool: Int[Tensor, " n_candidates"]
) -> tuple[Entries, Float[Tensor, "levels tokens d_out"]]:
    """Entries kept in the pooled columns and the reconstructions from them, by dense products, with gradient."""
    x, part, inner_widths = batch.x, batch.weights.of(pool), batch.cfg.inner_widths
    hidden_pre = x @ part.W_enc + part.b_enc
    acts = (hidden_pre if part.norms is None else hidden_pre * part.norms).detach().relu()
    indices = batch.ranks.topk_indices(acts, batch.n_keep)
    is_kept = torch.zeros_like(acts, dtype=torch.bool).flatten().scatter(0, indices, True).view_as(acts)
    codes = torch.where(is_kept & ~(acts <= 0), hidden_pre, 0)  # not `acts > 0`: keeps NaN, from broken weights
    tokens, columns = indices.div(len(pool), rounding_mode="floor"), indices % len(pool)
    values = codes.flatten().gather(0, indices)
    values = values if part.norms is None else values * part.norms[columns]
    # Columns of outer levels are zeroed: to slice, the host would have to wait for where a level ends in the pool.
    levels = level_of(pool, inner_widths)
    inner = [torch.where(levels <= level, codes, 0) for level in range(len(inner_widths))]
    return Entries(values, tokens, pool[columns]), torch.stack([*inner, codes]) @ part.W_dec
