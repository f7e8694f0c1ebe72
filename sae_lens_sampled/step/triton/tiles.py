"""How a scan splits the tokens of a batch into tiles."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_sampled.step.triton.launch import block, n_blocks

TILE_TOKENS = 64
TILE_ENTRIES = 4096


class Tiles(NamedTuple):
    """Tokens split into groups, and groups into tiles."""

    n_tokens: int
    group_size: int
    """At most the number of tokens; the last group may be shorter."""

    @property
    def tokens(self) -> int:
        """Maximum number of tokens in a tile, a power of 2."""
        return block(self.group_size, 4, TILE_TOKENS)

    @property
    def latents(self) -> int:
        """Maximum number of latents in a tile, a power of 2."""
        return min(TILE_ENTRIES // self.tokens, 256)

    @property
    def per_group(self) -> int:
        """Number of tiles in a group."""
        return n_blocks(self.group_size, self.tokens)

    @property
    def n_groups(self) -> int:
        """Number of groups in the batch."""
        return n_blocks(self.n_tokens, self.group_size)

    @property
    def n_tiles(self) -> int:
        """Number of tiles in the batch; with a short last group, some may be empty."""
        return self.n_groups * self.per_group

    def of_tokens(self, device: torch.device) -> Int[Tensor, " tokens"]:
        """Index of each token's tile."""
        token = torch.arange(self.n_tokens, device=device)
        return token // self.group_size * self.per_group + token % self.group_size // self.tokens
