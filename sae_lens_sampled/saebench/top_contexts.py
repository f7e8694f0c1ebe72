"""The text around the largest activations of an SAE's leading latents: those, not dense, with the most mass."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_sampled.metrics import ActivationStatistics

N_LATENTS = 8
N_CONTEXTS = 3
REACH = 10
"""Tokens shown before and after the largest activation."""
MAX_DENSITY = 0.1
"""Largest density of a leading latent; latents that are active more often rarely stand for one concept."""


class TopActivations:
    """The `N_CONTEXTS` largest batch maxima of each latent, and their positions in the text."""

    def __init__(self, d_sae: int, device: torch.device | str) -> None:
        self.values = torch.zeros(N_CONTEXTS, d_sae, device=device)
        self.places = torch.zeros(N_CONTEXTS, d_sae, dtype=torch.int64, device=device)
        self.tokens: list[Tensor] = []

    def update(self, tokens: Tensor, acts: Tensor) -> None:
        """Add one batch of running text: `tokens`, shape (n,), and `acts`, shape (n, d_sae)."""
        best = acts.amax(dim=0).to(self.values)
        rising = (best > self.values[-1]).nonzero()[:, 0]  # few after the first batches; locating maxima costs more
        place = acts[:, rising].argmax(dim=0) + sum(map(len, self.tokens))
        values = torch.cat([self.values[:, rising], best[None, rising]])
        places = torch.cat([self.places[:, rising], place[None]])
        self.values[:, rising], order = values.topk(N_CONTEXTS, dim=0)
        self.places[:, rising] = places.gather(0, order)
        self.tokens.append(tokens.cpu())


def top_contexts(top: TopActivations, statistics: ActivationStatistics, tokenizer: Any) -> list[dict[str, Any]]:
    """The latents with the most activation mass that are not dense, with the text around their largest activations."""
    mass = statistics.mass.masked_fill(statistics.density > MAX_DENSITY, 0)
    latents = mass.topk(min(N_LATENTS, len(mass))).indices
    return contexts_of(latents[mass[latents] > 0], top, statistics, tokenizer)


def contexts_of(
    latents: Int[Tensor, " n"], top: TopActivations, statistics: ActivationStatistics, tokenizer: Any
) -> list[dict[str, Any]]:
    """Density, share of the activation mass and text around the largest activations, for each of `latents`."""
    tokens = torch.cat(top.tokens).tolist()
    return [
        {
            "latent": latent,
            "density": statistics.density[latent].item(),
            "mass_share": (statistics.mass[latent] / statistics.mass.sum()).item(),
            "contexts": [
                {
                    "activation": value,
                    "before": tokenizer.decode(tokens[max(0, place - REACH) : place]),
                    "token": tokenizer.decode(tokens[place : place + 1]),
                    "after": tokenizer.decode(tokens[place + 1 : place + 1 + REACH]),
                }
                for value, place in zip(top.values[:, latent].tolist(), top.places[:, latent].tolist(), strict=True)
                if value > 0
            ],
        }
        for latent in latents.tolist()
    ]
