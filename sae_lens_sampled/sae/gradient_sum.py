"""Gradients of one SAE over several processes, exchanged only where they can be non-zero; few, if pools are small.

Except for latents in a pool and, if AuxK ran, dead ones, a latent's gradients are exactly 0 on every rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.ranks import GroupRanks, Ranks
from sae_lens_sampled.step.scores import SCORES, is_mergeable

LATENT_DIMENSION = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
"""Dimension that indexes the latents in a parameter; of other parameters the whole gradient is exchanged."""


class GradientSum:
    """Replaces gradients by their mean over ranks, inside `backward`, once the last parameter has its gradient.

    This cannot wait, since SAELens clips and steps right after `backward`. All gradients are exchanged together, so
    that the order of exchanges is the same on all ranks, whatever the order in which gradients are ready.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.active, self.is_expecting = ranks, None, False
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.n_ready = 0
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._ready)

    active: Tensor | None
    """Indices of the latents whose gradients may be non-zero in the next exchange; None for all."""
    is_expecting: bool
    """Whether there was a forward pass since the last exchange; a backward pass may be of several."""

    def expect(self, pool: Tensor | None, dead: Tensor | None) -> None:
        """Add, before `backward`, a forward pass's latents whose gradients may be non-zero; see `active_latents`."""
        active = active_latents(pool, dead)
        if self.is_expecting:
            active = None if active is None or self.active is None else torch.cat([self.active, active]).unique()
        self.active, self.is_expecting = active, True

    def _ready(self, _parameter: Tensor) -> None:
        self.n_ready += 1
        if self.n_ready == sum(parameter.requires_grad for parameter in self.parameters.values()):
            self.n_ready = 0
            self._sum()
            self.is_expecting = False

    @torch.no_grad()
    def _sum(self) -> None:
        for name, parameter in self.parameters.items():
            gradient, dimension = parameter.grad, LATENT_DIMENSION.get(name)
            if not parameter.requires_grad:  # frozen meanwhile
                continue
            assert gradient is not None
            if self.active is None or dimension is None:
                gradient.copy_(self.ranks.mean(gradient))
            else:
                part = self.ranks.mean(gradient.index_select(dimension, self.active))
                gradient.index_copy_(dimension, self.active, part)


def active_latents(pool: Tensor | None, dead: Tensor | None) -> Tensor | None:
    """Ascending indices of the latents that are in a pool of any rank or dead; None for all latents.

    Args:
        pool: indices of the candidates; None if every latent is one.
        dead: mask of the dead latents, which get a gradient from AuxK; None for none.
    """
    if pool is None:
        return None
    indices = pool.flatten()
    return indices if dead is None else torch.cat([indices, dead.nonzero()[:, 0]]).unique()


def join_group(sae: Any, group: ProcessGroup | None) -> Ranks:
    """Copy rank 0's weights and buffers to all processes of a group, and return these; see `data_parallel`."""
    check_is_exact(sae.cfg)
    ranks = GroupRanks(group)
    for parameter in sae.parameters():
        # A step may have laid W_enc out by latent, on some ranks only. But a broadcast sends memory as it lies, and
        # optimizers round strided and contiguous weights differently, so that the ranks' weights would drift apart.
        parameter.data = parameter.data.contiguous()
    for tensor in (*sae.parameters(), *sae.buffers()):
        ranks.broadcast(tensor.data)
    return ranks


def check_is_exact(cfg: SampledTopKTrainingSAEConfig) -> None:
    """Reject configs that several processes cannot compute exactly.

    Raises:
        ValueError: for one pool with a registered score that is not a `ColumnScore`, and for float64.
    """
    if cfg.pool_group_size is None and cfg.n_candidates < cfg.d_sae and not is_mergeable(cfg.score):
        raise ValueError(
            f"the registered score {cfg.score!r} cannot be computed across processes for one pool per batch; "
            f"set pool_group_size, or use one of {sorted(filter(is_mergeable, SCORES))}."
        )
    if cfg.dtype == "float64":
        raise ValueError(
            "dtype='float64' trains on one process only: several processes find the cutoff in float32. Use 'float32'."
        )
