"""Variants of the method that were tried on known features and are not in the package.

`eval/results/known_features.md` has the results that decided this.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, register_score
from sae_lens_sampled.sae.forward import SampledTrainStepOutput


@dataclass
class VariantConfig(SampledTopKTrainingSAEConfig):
    """
    Configuration class for training a VariantSAE.

    Args:
        first_pool_factor (float | None): Pool factor of the first training step, which then moves linearly to
            `pool_factor`. None: `pool_factor` from the start.
        moving_steps (int): Number of training steps that this takes.
        orthogonality (float): Weight of the mean squared cosine between different decoder rows of the pool.
    """

    first_pool_factor: float | None = None
    moving_steps: int = 0
    orthogonality: float = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sampled_topk_variant"


class VariantSAE(SampledTopKTrainingSAE):
    """Sampled-SAE with a pool factor that changes in training, or with a penalty on the pooled decoder rows."""

    cfg: VariantConfig  # type: ignore[assignment]

    def __init__(self, cfg: VariantConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.final_pool_factor = cfg.pool_factor

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> SampledTrainStepOutput:
        cfg = self.cfg
        if cfg.first_pool_factor is not None:
            done = min(step_input.n_training_steps / cfg.moving_steps, 1)
            cfg.pool_factor = cfg.first_pool_factor + done * (self.final_pool_factor - cfg.first_pool_factor)
        output = super().training_forward_pass(step_input)
        if cfg.orthogonality:
            assert output.pool is not None
            output.loss = output.loss + cfg.orthogonality * mean_squared_cosine(self.W_dec[output.pool[0]])
        return output


def mean_squared_cosine(rows: Tensor) -> Tensor:
    """Mean squared cosine over pairs of different rows."""
    directions = rows / rows.norm(dim=1, keepdim=True)
    cosines = directions @ directions.T
    return (cosines.square().sum() - cosines.diagonal().square().sum()) / (len(rows) * (len(rows) - 1))


def winsorised_group(acts: Tensor, n_candidates: int, pool_factor: int) -> Tensor:
    r"""$\sum_i \min(a_i, c)^2$, c the smallest activation that the group keeps if every latent is a candidate.

    Values above the cutoff count as the cutoff: a latent cannot win its place by a few very large values.
    """
    n_kept = max(n_candidates * acts.shape[-2] // pool_factor, 1)
    cutoff = acts.flatten(-2).topk(n_kept).values[..., -1]
    return torch.minimum(acts, cutoff[..., None, None]).square().sum(dim=-2)


@cache
def register_variants() -> None:
    """Register the variants' scores and architecture in this process."""
    for factor in (5, 10, 20):
        register_score(f"winsorised_group_{factor}", partial(winsorised_group, pool_factor=factor))
    register_sae_training_class("sampled_topk_variant", VariantSAE, VariantConfig)
