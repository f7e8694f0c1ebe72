"""The most active latents of each SAE: their contexts, where they look, and how much the contexts have in common."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm import tqdm
from transformer_lens import HookedTransformer

from latents.attribution import attribute, coherence
from sae_lens_sampled.metrics import ActivationStatistics
from sae_lens_sampled.saebench.top_contexts import MAX_DENSITY, N_CONTEXTS, TopActivations

REACH = 31
"""Tokens before the one on which a latent is active that it is attributed to, and that are shown."""
AFTER = 8
"""Tokens shown after it."""
N_PARTS = 32
"""Parts of the text, of which each gives one context to a latent at most."""


@torch.no_grad()
def states_of(model: HookedTransformer, prompts: Int[Tensor, "prompts context"], hook_name: str) -> Tensor:
    """The model's states at a hook, shape (prompts, context, d_model)."""
    layer = int(hook_name.split(".")[1])
    batches = []
    for batch in tqdm(prompts.split(8), desc="Language model"):
        cache = model.run_with_cache(batch, names_filter=[hook_name], stop_at_layer=layer + 1)[1]
        batches.append(cache[hook_name].float())
    return torch.cat(batches)


def describe(
    model: HookedTransformer, saes: Mapping[str, SAE], prompts: Int[Tensor, "prompts context"], n_latents: int
) -> list[dict[str, Any]]:
    """A row for each of the `n_latents` latents of an SAE that carry most of its activation without being dense.

    Args:
        model: the language model.
        saes: exported SAEs of one hook, by name.
        prompts: the text; the first token of each is one of the tokenizer's own, on which nothing is counted.
        n_latents: latents of each SAE.

    Raises:
        ValueError: if an SAE has no such latent.
    """
    [hook_name] = {str(sae.cfg.metadata.hook_name) for sae in saes.values()}
    states = states_of(model, prompts, hook_name)
    mean = states[:, 1:].mean(dim=(0, 1))
    with torch.no_grad():
        embeddings = model.input_to_embed(prompts[: len(prompts) // 8 + 1])[0]
    baseline = embeddings.mean(dim=(0, 1))
    rows = []
    for name, sae in saes.items():
        statistics, places = most_active(sae, states, n_latents)
        if not places:
            raise ValueError(
                f"SAE {name!r}: no latent is active in {N_CONTEXTS} parts of the text and on at most {MAX_DENSITY:.0%} "
                "of its tokens; take more text."
            )
        for latent, of_latent in tqdm(places.items(), desc=name):
            contexts = [context(prompts, model.tokenizer, *place) for place in of_latent]
            found = [
                attribute(model, sae, latent, prompts[prompt, max(0, at - REACH) : at + 1], baseline)
                for prompt, at in of_latent
            ]
            at_places = torch.stack([states[prompt, at] for prompt, at in of_latent])
            rows.append(
                {
                    "sae": name,
                    "latent": latent,
                    "density": statistics.density[latent].item(),
                    "own_share": mean_of(a.own_share for a in found),
                    "n_tokens": mean_of(a.n_tokens for a in found),
                    "completeness_error": max(a.completeness_error for a in found),
                    "coherence": coherence(at_places, mean),
                    "chance": coherence(random_states(states, len(of_latent), seed=len(rows)), mean),
                    "contexts": contexts,
                }
            )
    return rows


@torch.no_grad()
def most_active(
    sae: SAE, states: Float[Tensor, "prompts context d_model"], n_latents: int
) -> tuple[ActivationStatistics, dict[int, list[tuple[int, int]]]]:
    """Statistics of an SAE, and for its leading latents the prompts and places where they are most active."""
    n_context = states.shape[1]
    statistics, top = ActivationStatistics(sae.cfg.d_in, sae.cfg.d_sae), TopActivations(sae.cfg.d_sae, "cpu")
    for batch in states.tensor_split(min(N_PARTS, len(states))):
        acts = sae.encode(batch)
        statistics.update(batch[:, 1:].flatten(0, 1), acts[:, 1:].flatten(0, 1), sae.decode(acts[:, 1:]).flatten(0, 1))
        acts[:, 0] = 0  # places are counted with it, and none is there
        top.update(torch.zeros(acts[..., 0].numel()), acts.flatten(0, 1))
    mass = statistics.mass.masked_fill(statistics.density > MAX_DENSITY, 0)
    seen_often = (top.values > 0).all(dim=0)  # in as many places as are compared
    mass = mass.masked_fill(~seen_often, 0)
    latents = mass.topk(min(n_latents, int((mass > 0).sum()))).indices.tolist()
    return statistics, {latent: [divmod(p, n_context) for p in top.places[:, latent].tolist()] for latent in latents}


def context(prompts: Tensor, tokenizer: Any, prompt: int, at: int) -> dict[str, str]:
    """The text around a place."""
    tokens = prompts[prompt].tolist()
    return {
        "before": tokenizer.decode(tokens[max(1, at - REACH) : at]),
        "token": tokenizer.decode(tokens[at : at + 1]),
        "after": tokenizer.decode(tokens[at + 1 : at + 1 + AFTER]),
    }


def random_states(states: Float[Tensor, "prompts context d_model"], n: int, seed: int) -> Tensor:
    """States at `n` places drawn at random, none of them at the beginning of a prompt."""
    rows = states[:, 1:].flatten(0, 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]]


def mean_of(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


assert N_CONTEXTS > 1, "coherence is of two places at least"
