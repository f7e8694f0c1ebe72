"""What a training step tells of each latent: how often it was selected, and how often its threshold would let it fire.

The dense path counts in its matrices, the restricted one in the kept entries; the numbers are the same.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_sampled.restricted import Restricted, chunk_width


class StepCounts(NamedTuple):
    """Counts over the tokens of one batch."""

    n_selected: Int[Tensor, " d_sae"]
    """Tokens on which the latent was kept, with a positive activation."""
    n_fired: Int[Tensor, " d_sae"]
    """Tokens with a pre-activation above its threshold."""
    n_hits: Int[Tensor, " d_sae"]
    """Tokens with both."""
    peak: Float[Tensor, " d_sae"]
    """Its largest activation, at least 0."""


@torch.no_grad()
def count_dense(
    feature_acts: Float[Tensor, "tokens d_sae"],
    hidden_pre: Float[Tensor, "tokens d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> StepCounts:
    """From whole matrices, a chunk of rows at a time that stays in the cache."""
    sums, peaks = [], []
    n_rows = chunk_width(feature_acts.T)
    for acts, pre in zip(feature_acts.split(n_rows), hidden_pre.split(n_rows), strict=True):
        kept, fired = acts > 0, pre > threshold
        sums.append(torch.stack([one.sum(dim=0, dtype=torch.int32) for one in (kept, fired, fired & kept)]))
        peaks.append(pre.amax(dim=0))
    n_selected, n_fired, n_hits = torch.stack(sums).sum(dim=0)
    return StepCounts(n_selected, n_fired, n_hits, torch.stack(peaks).amax(dim=0).relu())


@torch.no_grad()
def count_restricted(found: Restricted, threshold: Float[Tensor, " d_sae"]) -> StepCounts:
    """From the kept entries, and what the scan saw of all latents."""
    values, latents = found.kept.values, found.kept.latents
    positive, fired = values > 0, values > threshold[latents]
    n_selected, n_hits = (
        torch.zeros(len(threshold), dtype=torch.int64, device=latents.device).scatter_add_(0, latents, one.long())
        for one in (positive, positive & fired)
    )
    return StepCounts(n_selected, found.scan.n_fired, n_hits, found.scan.peak)
