"""A text with the language model's states, and where an SAE's latents are active on it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm import tqdm
from transformer_lens import HookedTransformer

from sae_lens_sampled.saebench.top_contexts import MAX_DENSITY

BATCH = 8
"""Prompts encoded at a time."""


@dataclass(frozen=True)
class Text:
    """Text with the language model's states at one hook; the first token of each prompt is not counted."""

    model: HookedTransformer
    prompts: Int[Tensor, "prompts context"]
    states: Float[Tensor, "prompts context d_model"]

    @property
    def half(self) -> int:
        """Number of prompts in the first half, from which places are shown; passages are from the second half."""
        return len(self.prompts) // 2

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Mean of the states, without first tokens."""
        return self.states[:, 1:].mean(dim=(0, 1))

    @cached_property
    @torch.no_grad()
    def baseline(self) -> Float[Tensor, " d_model"]:
        """Mean embedding over about an eighth of the prompts, which stands for each token of an empty text."""
        return self.model.input_to_embed(self.prompts[: len(self.prompts) // 8 + 1])[0].mean(dim=(0, 1))

    def decode(self, prompt: int, start: int, end: int) -> str:
        """Text of the tokens from `start` up to but not including `end`."""
        return self.model.tokenizer.decode(self.prompts[prompt, start:end].tolist())  # type: ignore[union-attr]


class Firings:
    """Nonzero activations of all latents of an SAE on a text."""

    @torch.no_grad()
    def __init__(self, sae: SAE, states: Float[Tensor, "prompts context d_model"]) -> None:
        self.shape = states.shape[:2]
        latents, places, values = [], [], []
        for number, batch in enumerate(states.split(BATCH)):
            acts = sae.encode(batch)
            acts[:, 0] = 0  # first tokens do not count
            at, latent = acts.flatten(0, 1).nonzero(as_tuple=True)
            places.append(at + number * BATCH * self.shape[1])
            latents.append(latent)
            values.append(acts.flatten(0, 1)[at, latent])
        order = torch.cat(latents).argsort(stable=True)
        counts = torch.bincount(torch.cat(latents), minlength=sae.cfg.d_sae)
        self.places = torch.cat(places)[order].split(counts.tolist())
        self.values = torch.cat(values)[order].split(counts.tolist())
        self.density: Float[Tensor, " d_sae"] = counts / (self.shape[0] * (self.shape[1] - 1))
        """Share of the tokens on which each latent is active, without first tokens."""
        self.mass = torch.stack([of_latent.sum() for of_latent in self.values])

    def acts(self, latent: int) -> Float[Tensor, "prompts context"]:
        """Activations of one latent."""
        acts = torch.zeros(self.shape.numel())
        acts[self.places[latent]] = self.values[latent]
        return acts.unflatten(0, self.shape)

    def leading(self) -> list[int]:
        """Latents that are active but not dense, in order of decreasing total activation."""
        mass = self.mass.masked_fill(self.density > MAX_DENSITY, 0)
        return mass.argsort(descending=True, stable=True)[: int((mass > 0).sum())].tolist()


@torch.no_grad()
def states_of(model: HookedTransformer, prompts: Int[Tensor, "prompts context"], hook_name: str) -> Tensor:
    """The model's states at a hook, shape (prompts, context, d_model)."""
    layer = int(hook_name.split(".")[1])
    batches = []
    for batch in tqdm(prompts.split(BATCH), desc="Language model"):
        cache = model.run_with_cache(batch, names_filter=[hook_name], stop_at_layer=layer + 1)[1]
        batches.append(cache[hook_name].float())
    return torch.cat(batches)
