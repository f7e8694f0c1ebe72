"""A row for each leading latent of each SAE: what drives it, what its token alone predicts, what a reader sees."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from tqdm import tqdm
from transformer_lens import HookedTransformer

from latents.attribution import attribute, coherence
from latents.firings import Firings, Text, states_of
from latents.places import N_BANDS, PASSAGE, Passage, Place, asked_passages, bands_of, shown_places
from latents.token_alone import commonest, learn, passage_scores, token_scores
from sae_lens_sampled.saebench.top_contexts import MAX_DENSITY

REACH = 31
"""Number of tokens before the active one that are shown and that a latent is attributed to."""
AFTER = 8
"""Number of tokens shown after the active one."""


def describe(
    model: HookedTransformer,
    saes: Mapping[str, SAE],
    prompts: Int[Tensor, "prompts context"],
    n_latents: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows for the `n_latents` latents of each SAE that carry most of its activation without being dense.

    Latents with too few places or passages to show are skipped, and the next ones take their place.

    Args:
        model: the language model.
        saes: exported SAEs of one hook, by name.
        prompts: the text; the first token of each prompt, a special token if the model uses one, is not counted.
        n_latents: number of latents per SAE.
        seed: seed for the draw of places and passages.

    Raises:
        ValueError: if an SAE has no latent to show.
    """
    [hook_name] = {str(sae.cfg.metadata.hook_name) for sae in saes.values()}
    text, rng = Text(model, prompts, states_of(model, prompts, hook_name)), random.Random(seed)
    rows = []
    for name, sae in saes.items():
        of_sae = list(tqdm(itertools.islice(rows_of(text, sae, rng), n_latents), desc=name, total=n_latents))
        if not of_sae:
            raise ValueError(
                f"SAE {name!r}: no latent that is active on at most {MAX_DENSITY:.0%} of the tokens fires often enough "
                "for the places and passages that the page shows; use more text (--tokens)."
            )
        rows += [{"sae": name, **row} for row in of_sae]
    return rows


def rows_of(text: Text, sae: SAE, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of an SAE's latents, in order of decreasing total activation."""
    firings = Firings(sae, text.states)
    for latent in firings.leading():
        acts = firings.acts(latent)
        drawn = draw(text, acts, rng)
        if drawn is not None:
            places, passages = drawn
            yield {
                "latent": latent,
                "density": firings.density[latent].item(),
                **looks(text, sae, latent, places[:N_BANDS]),
                **told_by_token(text, acts > 0, passages),
                **shown(text, acts, places, passages),
            }


def draw(
    text: Text, acts: Float[Tensor, "prompts context"], rng: random.Random
) -> tuple[list[Place], list[Passage]] | None:
    """Draw places from the first half of the text and passages from the second; None if there are too few of either."""
    bands, half = bands_of(acts), text.half

    def around(prompt: int, at: int) -> tuple[str, ...]:
        return tuple(context(text, prompt, at).values())

    places = shown_places(bands[:half], around, rng)
    passages = asked_passages(bands[half:], text.prompts[half:], rng)
    if places is None or passages is None:
        return None
    return places, [passage._replace(prompt=passage.prompt + half) for passage in passages]


def looks(text: Text, sae: SAE, latent: int, places: list[Place]) -> dict[str, float]:
    """Which tokens drive a latent at some places, and how similar the model's states are at these places."""
    found = [
        attribute(text.model, sae, latent, text.prompts[prompt, max(0, at - REACH) : at + 1], text.baseline)
        for prompt, at, _ in places
    ]
    return {
        "own_share": mean_of(a.own_share for a in found),
        "n_tokens": mean_of(a.n_tokens for a in found),
        "completeness_error": max(a.completeness_error for a in found),
        "coherence": coherence(torch.stack([text.states[prompt, at] for prompt, at, _ in places]), text.mean),
        "chance": coherence(random_states(text.states, len(places), seed=latent), text.mean),
    }


def told_by_token(text: Text, fires: Tensor, passages: list[Passage]) -> dict[str, Any]:
    """How well the token alone, with rates from the first half of the text, predicts firing in the second."""
    half, prompts = text.half, text.prompts
    known = learn(prompts[:half], fires[:half], int(prompts.max()) + 1)
    named = passage_scores(known.rates[prompts]) >= known.in_passages
    token, share = commonest(prompts, fires)
    return {
        "commonest_token": text.model.tokenizer.decode([token]),  # type: ignore[union-attr]
        "commonest_share": share,
        **token_scores(known, prompts[half:], fires[half:]),
        "token_fires": numbers_of(named[passage.prompt, passage.window] for passage in passages),
    }


def shown(
    text: Text, acts: Float[Tensor, "prompts context"], places: list[Place], passages: list[Passage]
) -> dict[str, Any]:
    """A latent's places and passages for the page, and the bands, activations and answers that the page hides.

    `n_same_token` is the largest number of places that have the same token.
    """
    tokens = Counter(int(text.prompts[prompt, at]) for prompt, at, _ in places)
    return {
        "n_same_token": max(tokens.values()),
        "contexts": [
            context(text, prompt, at) | {"band": band, "activation": acts[prompt, at].item()}
            for prompt, at, band in places
        ],
        "passages": [
            {
                "before": text.decode(passage.prompt, passage.start - PASSAGE, passage.start),
                "text": text.decode(passage.prompt, passage.start, passage.start + PASSAGE),
                "band": passage.band,
            }
            for passage in passages
        ],
        "fires": numbers_of(passage.band > 0 for passage in passages),
    }


def context(text: Text, prompt: int, at: int) -> dict[str, str]:
    """The text around a place."""
    return {
        "before": text.decode(prompt, max(1, at - REACH), at),
        "token": text.decode(prompt, at, at + 1),
        "after": text.decode(prompt, at + 1, at + 1 + AFTER),
    }


def random_states(states: Float[Tensor, "prompts context d_model"], n: int, seed: int) -> Tensor:
    """States at `n` places drawn at random, none of them at the beginning of a prompt."""
    rows = states[:, 1:].flatten(0, 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]]


def numbers_of(true: Any) -> list[int]:
    """Positions, counted from 1, of the true values."""
    return [number for number, value in enumerate(true, start=1) if value]


def mean_of(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
