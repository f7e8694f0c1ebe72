"""A training run's record of its pools, and the statistics logged from it."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lens_sampled.metrics import gini

NORM_EMA_RATE = 0.01
"""Weight of the newest batch in the running mean of input norms."""


class PoolRecord(nn.Module):
    """Running record of pools and selections; updated every step without waiting for the device.

    Every buffer is persistent, so a resumed run continues where it stopped.
    """

    n_steps: Tensor
    """Training steps so far, int64, shape (). Also the index of a sampled pool's random draw, for which SAELens' own
    counter would not do: it is one too low in intermediate checkpoints."""
    selection_counts: Tensor
    """Number of kept positive entries of each latent over all steps, int64, shape (d_sae,)."""
    last_pooled: Tensor
    """The latest step, counted from 1, at which each latent was in a pool (with groups: in that of any group), int64,
    shape (d_sae,); 0 if it never was."""
    churn: Tensor
    """1 - Jaccard similarity of the two latest pools, float32, shape (); 0 until there are two."""
    cutoff: Tensor
    """The smallest positive activation kept in the latest batch that kept any, float32, shape (); before that 0, or the
    threshold that a warm start begins with."""
    input_norm: Tensor
    """Running mean of the inputs' norms, float32, shape (); 0 if unknown. Tokens with a different mean norm are unlike
    the training tokens."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("selection_counts", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self.register_buffer("last_pooled", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self.register_buffer("churn", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("cutoff", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("input_norm", torch.zeros((), dtype=torch.float32, device=device))

    @property
    def pool(self) -> Bool[Tensor, " d_sae"]:
        """Mask of the latest pool (with groups: the union of their pools); all False before the first step."""
        return (self.last_pooled == self.n_steps) & self.ever_pooled

    @property
    def ever_pooled(self) -> Bool[Tensor, " d_sae"]:
        """Whether a latent was ever in a pool."""
        return self.last_pooled > 0

    def pooled_within(self, n_steps: int) -> Bool[Tensor, " d_sae"]:
        """Whether a latent was in a pool within the last `n_steps` steps."""
        return self.ever_pooled & (self.last_pooled > self.n_steps - n_steps)

    @torch.no_grad()
    def update(
        self,
        selection_counts: Int[Tensor, " d_sae"],
        smallest: Float[Tensor, ""],
        pool: Int[Tensor, "groups n_candidates"] | None,
    ) -> None:
        """Record one training step.

        Args:
            selection_counts: number of positive entries of each latent that the batch kept.
            smallest: the smallest positive kept activation; infinite if the batch kept none.
            pool: indices of the candidates; None if every latent was a candidate.
        """
        old_pool, new_pool = self.pool, torch.full_like(self.pool, pool is None)
        if pool is not None:
            new_pool.index_fill_(0, pool.flatten(), True)
        overlap = (old_pool & new_pool).sum() / (old_pool | new_pool).sum()
        self.cutoff.copy_(torch.where(smallest.isfinite(), smallest.to(self.cutoff.dtype), self.cutoff))
        self.churn.copy_(torch.where(self.n_steps > 0, 1 - overlap, 0.0))
        self.selection_counts += selection_counts
        self.n_steps += 1
        self.last_pooled.copy_(torch.where(new_pool, self.n_steps, self.last_pooled))

    @torch.no_grad()
    def update_input_norm(self, mean_norm: Float[Tensor, ""]) -> None:
        """Update the running mean with the mean norm of a batch's inputs; the first batch sets it."""
        moved = self.input_norm.lerp(mean_norm.to(self.input_norm.dtype), NORM_EMA_RATE)
        self.input_norm.copy_(torch.where(self.input_norm > 0, moved, mean_norm))


POOL_STATISTICS: dict[str, Callable[[PoolRecord], Tensor]] = {
    "pooled_latents": lambda record: record.pool.sum(),
    "pool_churn": lambda record: record.churn,
    "ever_pooled_share": lambda record: record.ever_pooled.double().mean(),
    "starved_share": lambda record: 1 - record.ever_pooled.double().mean(),
    "selection_gini": lambda record: gini(record.selection_counts),
    "cutoff": lambda record: record.cutoff,
}
"""Scalars that are logged during training and returned by `pool_statistics()`."""
