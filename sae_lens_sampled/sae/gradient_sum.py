"""Gradients of one SAE over several processes: summed where they are not 0, which is in a small part of the weights.

Outside the latents that were in a pool, and the dead ones where AuxK ran, a step's gradient is exactly 0 on every rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.ranks import GroupRanks, Ranks
from sae_lens_sampled.step.scores import SCORES, is_mergeable

LATENT_DIMENSION = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
"""Which dimension of a parameter has the latents; of others the whole gradient is summed."""


class GradientSum:
    """Replaces gradients by their mean over ranks, inside `backward`, when the last parameter has its own.

    The host clips and steps right after `backward`, so nothing else comes in between. All parameters in one place: then
    the order of exchanges is the same on all ranks, whatever the order of their gradients.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.active = ranks, None
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.n_ready = 0
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._ready)

    active: Tensor | None
    """Indices of the latents whose gradients may be other than 0 in this step; None for all."""

    def expect(self, pool: Tensor | None, dead: Tensor | None) -> None:
        """Say before `backward` where gradients may be other than 0; see `active_latents`."""
        self.active = active_latents(pool, dead)

    def _ready(self, _parameter: Tensor) -> None:
        self.n_ready += 1
        if self.n_ready == len(self.parameters):
            self.n_ready = 0
            self._sum()

    @torch.no_grad()
    def _sum(self) -> None:
        for name, parameter in self.parameters.items():
            gradient, dimension = parameter.grad, LATENT_DIMENSION.get(name)
            assert gradient is not None
            if self.active is None or dimension is None:
                gradient.copy_(self.ranks.mean(gradient))
            else:
                part = self.ranks.mean(gradient.index_select(dimension, self.active))
                gradient.index_copy_(dimension, self.active, part)


def active_latents(pool: Tensor | None, dead: Tensor | None) -> Tensor | None:
    """Indices of the latents that are in a pool of any rank or dead, ascending; None for all.

    Args:
        pool: indices of the candidates; None if every latent is one.
        dead: which latents are dead, and so have a gradient by AuxK; None for none.
    """
    if pool is None:
        return None
    indices = pool.flatten()
    return indices if dead is None else torch.cat([indices, dead.nonzero()[:, 0]]).unique()


def join_group(sae: Any, group: ProcessGroup | None) -> Ranks:
    """The processes of a group, which have rank 0's weights and buffers from now on; see `data_parallel`."""
    check_is_exact(sae.cfg)
    ranks = GroupRanks(group)
    for tensor in (*sae.parameters(), *sae.buffers()):
        ranks.broadcast(tensor.data)
    return ranks


def check_is_exact(cfg: SampledTopKTrainingSAEConfig) -> None:
    """Refuse what several processes cannot work out exactly.

    Raises:
        ValueError: for a registered score with one pool, and for float64.
    """
    if cfg.pool_group_size is None and cfg.n_candidates < cfg.d_sae and not is_mergeable(cfg.score):
        raise ValueError(
            f"the registered score {cfg.score!r} of one pool cannot be worked out from what several processes have; "
            f"take pool_group_size, or one of {sorted(filter(is_mergeable, SCORES))}."
        )
    if cfg.dtype == "float64":
        raise ValueError("several processes find their cutoff in float32; dtype='float64' trains on one.")
