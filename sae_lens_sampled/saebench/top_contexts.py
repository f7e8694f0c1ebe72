"""Where an SAE's leading latents are most active, as text to read."""

from typing import Any

import torch
from sae_lens.saes.sae import SAE

from sae_lens_sampled.activation_statistics import ActivationStatistics
from sae_lens_sampled.saebench.core import Recording

N_LATENTS = 8
N_CONTEXTS = 3
REACH = 10
"""Tokens shown before and after."""
MAX_DENSITY = 0.1
"""A latent that is active more often than this is rarely about one thing."""
MAX_TOKENS = 50_000


@torch.no_grad()
def top_contexts(
    recording: Recording, sae: SAE[Any], statistics: ActivationStatistics, tokenizer: Any
) -> list[dict[str, Any]]:
    """The latents that carry the largest activation mass without being dense, with the places they are most active.

    Searched in the first 50,000 tokens of the recording.
    """
    mass = statistics.mass.masked_fill(statistics.density > MAX_DENSITY, 0)
    latents = mass.topk(min(N_LATENTS, len(mass))).indices
    latents = latents[mass[latents] > 0]
    n_batches = len(recording.activations)
    tokens = recording.tokens[-n_batches:]
    n_used = max(1, min(n_batches, MAX_TOKENS // tokens[0].numel()))
    batches = zip(tokens[:n_used], recording.activations, strict=False)
    acts = torch.cat(
        [
            sae.encode(x.to(sae.device, sae.dtype))[..., latents].cpu() * ~recording.is_ignored(part).cpu()[..., None]
            for part, x in batches
        ]
    ).float()
    rows = torch.cat(tokens[:n_used]).cpu()
    return [
        {
            "latent": int(latent),
            "density": statistics.density[latent].item(),
            "mass_share": (statistics.mass[latent] / statistics.mass.sum()).item(),
            "contexts": _contexts(acts[..., i], rows, tokenizer),
        }
        for i, latent in enumerate(latents)
    ]


def _contexts(acts: torch.Tensor, rows: torch.Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """The largest activations of one latent, one per row of text; `acts` and `rows` have shape (prompts, context)."""
    best, position = acts.max(dim=1)
    found = []
    for row in best.topk(min(N_CONTEXTS, len(best))).indices.tolist():
        if best[row] <= 0:
            break
        at = int(position[row])
        ids = rows[row].tolist()
        found.append(
            {
                "activation": best[row].item(),
                "before": tokenizer.decode(ids[max(0, at - REACH) : at]),
                "token": tokenizer.decode(ids[at]),
                "after": tokenizer.decode(ids[at + 1 : at + 1 + REACH]),
            }
        )
    return found
