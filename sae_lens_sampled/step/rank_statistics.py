"""Stage one over several processes: what a batch tells of each latent, where each rank has some of its tokens.

Every score that judges a latent by its own activations is a function of sums over tokens and of its largest activation.
`ridge_leverage` needs the rows of its sketch, of which each rank has some.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_sampled.step.ranks import Ranks
from sae_lens_sampled.step.scores import ridge_leverage, sketch_rows


class ColumnSums(NamedTuple):
    """What some tokens tell of each latent."""

    peak: Float[Tensor, " latents"]
    """Largest activation."""
    sums: Float[Tensor, "sums latents"]
    """Sums over tokens: of squares, and those that the score needs (`SUMS`)."""


class MergedStatistics(NamedTuple):
    """What all tokens of a batch tell of each latent; the same on all ranks."""

    scores: Float[Tensor, " latents"]
    norms: Float[Tensor, " latents"]
    alive: Bool[Tensor, " latents"]
    peak: Float[Tensor, " latents"]


@torch.no_grad()
def column_sums(acts: Float[Tensor, "tokens latents"], score: str) -> ColumnSums:
    """The sums of one rank's tokens, in float32 at least; `acts` are not negative."""
    acts = acts.to(torch.promote_types(acts.dtype, torch.float32))
    peak = acts.amax(dim=0)
    return ColumnSums(peak, torch.stack([acts.square().sum(dim=0), *SUMS.get(score, _no_sums)(acts, peak)]))


@torch.no_grad()
def merged_statistics(of_rank: ColumnSums, score: str, n_tokens: int, ranks: Ranks) -> MergedStatistics:
    """Statistics of the whole batch, for one pool.

    Args:
        of_rank: this rank's sums, of all latents.
        score: a key of `MERGEABLE`; for "ridge_leverage" `sketch_scores` are to be put in.
        n_tokens: of all ranks together.
        ranks: the processes.
    """
    peak = ranks.max(of_rank.peak)
    squares, *sums = of_rank.sums
    if score in SHANNON:
        sums = _shares_of(peak, of_rank.peak, *sums)
    squares, *sums = ranks.sum(torch.stack([squares, *sums]))
    norms = squares.sqrt()
    return MergedStatistics(MERGEABLE[score](norms, peak, n_tokens, *sums), norms, peak > 0, peak)


@torch.no_grad()
def sketch_scores(
    rows_of: Callable[[Tensor], Float[Tensor, "rows latents"]],
    n_own: int,
    n_candidates: int,
    device: torch.device,
    ranks: Ranks,
) -> Float[Tensor, " latents"]:
    """`ridge_leverage` of the whole batch, of which this rank has the tokens from `rank * n_own` on.

    `rows_of` gives the activations, not negative, of some of this rank's tokens.
    """
    rows = sketch_rows(n_own * ranks.count, device)
    own = rows.div(n_own, rounding_mode="floor") == ranks.rank
    acts = rows_of(rows[own] % n_own)
    acts = acts.to(torch.promote_types(acts.dtype, torch.float32))
    sketch = acts.new_zeros(len(rows), acts.shape[1])
    sketch[own] = acts
    with torch.autocast(device.type, enabled=False):
        return ridge_leverage(ranks.sum(sketch), n_candidates)


def _no_sums(acts: Tensor, peak: Tensor) -> list[Tensor]:  # noqa: ARG001
    return []


def _share_sums(acts: Tensor, peak: Tensor) -> list[Tensor]:
    """Sums of a / peak and of its x log x: as in the scores themselves, sums of a would leave the range."""
    share = acts / peak.clamp(min=torch.finfo(acts.dtype).tiny)
    return [share.sum(dim=0), torch.special.xlogy(share, share).sum(dim=0)]


def _shares_of(peak: Tensor, own_peak: Tensor, shares: Tensor, logs: Tensor) -> list[Tensor]:
    """Sums of a / peak and its x log x, from those of the rank's own peak."""
    factor = own_peak / peak.clamp(min=torch.finfo(peak.dtype).tiny)
    return [factor * shares, factor * logs + torch.special.xlogy(factor, factor) * shares]


def _shannon_entropy(shares: Tensor, logs: Tensor) -> Tensor:
    total = shares.clamp(min=torch.finfo(shares.dtype).tiny)
    return (total.log() - logs / total).clamp(min=0)


def _entropy(norms: Tensor, peak: Tensor, n_tokens: int, shares: Tensor, logs: Tensor) -> Tensor:  # noqa: ARG001
    log_n_tokens = torch.tensor(float(n_tokens), dtype=peak.dtype).log().item()
    concentration = (1 - _shannon_entropy(shares, logs) / log_n_tokens).clamp(min=0)
    return torch.where(peak > 0, concentration, 0)


def _perplexity(norms: Tensor, peak: Tensor, n_tokens: int, shares: Tensor, logs: Tensor) -> Tensor:  # noqa: ARG001
    return torch.where(peak > 0, _shannon_entropy(shares, logs).exp(), 0)


SHANNON = ("entropy", "perplexity")
SUMS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "entropy": _share_sums,
    "perplexity": _share_sums,
    "frequency": lambda acts, _: [(acts > 0).sum(dim=0).to(acts.dtype)],
}
"""Sums that a score needs besides that of squares, from a rank's activations and largest activations."""
MERGEABLE: dict[str, Callable[..., Tensor]] = {
    "l2_norm": lambda norms, _peak, _n_tokens: norms,
    "squared_l2": lambda norms, _peak, _n_tokens: norms.square(),
    "entropy": _entropy,
    "perplexity": _perplexity,
    "frequency": lambda _norms, _peak, _n_tokens, n_positive: n_positive,
    "uniform": lambda _norms, peak, _n_tokens: (peak > 0).to(peak.dtype),
    "ridge_leverage": lambda norms, _peak, _n_tokens: norms,
}
"""The built-in scores, from norms, largest activations, number of tokens and their own sums, of all tokens; the same as
in `scores.py`."""
