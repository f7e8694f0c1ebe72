"""Which places of a text a reader sees for a latent, and which passages the reader is then asked about.

Places, and passages on which the latent fires, are drawn at random from five bands of activation: the fifths, by rank,
of all places where it is active.
The strongest places often have the same common token; the rest of a latent's range is more informative.
"""

import itertools
import random
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

N_BANDS = 5
MORE = (5, 4, 3)
"""Bands of the additional places, which a reader sees after one place from each band."""
N_SHOWN = N_BANDS + len(MORE)
N_PASSAGES = 10
N_POSITIVE = (3, 7)
"""Smallest and largest number of passages on which the latent fires; the number is drawn for each latent, so that
readers cannot rely on it."""
PASSAGE = 16
"""Tokens of a passage; the same number of preceding tokens is shown before it."""

Candidate = TypeVar("Candidate")


class Place(NamedTuple):
    """A token on which a latent is active."""

    prompt: int
    at: int
    band: int
    """From 1, the weakest fifth of the latent's activations, to 5."""


class Passage(NamedTuple):
    """A run of consecutive tokens."""

    prompt: int
    window: int
    """Index among the prompt's `windows`, from 0."""
    band: int
    """Band of the strongest activation; 0 if the latent fires on none of its tokens."""

    @property
    def start(self) -> int:
        """Position of the passage's first token in the prompt."""
        return 1 + (self.window + 1) * PASSAGE


def bands_of(acts: Float[Tensor, "prompts context"]) -> Int[Tensor, "prompts context"]:
    """Band of every place, 1 to 5; 0 where the latent is not active. Ties are in text order."""
    active = acts > 0
    n = int(active.sum())
    in_order = torch.arange(n, device=acts.device) * N_BANDS // max(n, 1) + 1
    bands = torch.zeros_like(acts, dtype=torch.int64)
    bands[active] = torch.zeros_like(in_order).scatter(0, acts[active].argsort(stable=True), in_order)
    return bands


def windows(values: Shaped[Tensor, "prompts context"]) -> Shaped[Tensor, "prompts passages tokens"]:
    """All passages: runs of `PASSAGE` tokens that follow a prompt's first token.

    The first run, which no text precedes, and an incomplete last one are left out.
    """
    n = (values.shape[1] - 1) // PASSAGE
    return values[:, 1 : 1 + n * PASSAGE].unflatten(1, (n, PASSAGE))[:, 1:]


def shown_places(
    bands: Int[Tensor, "prompts context"], context: Callable[[int, int], Hashable], rng: random.Random
) -> list[Place] | None:
    """One place of each band, then one of each band in `MORE`, both strongest first; None if there are too few places.

    No two places are from the same prompt, and no two contexts are equal.

    Args:
        bands: band of every place of the text.
        context: what is shown around a place, given its prompt and position.
        rng: generator that draws among the places of a band.
    """
    active = [Place(prompt, at, int(bands[prompt, at])) for prompt, at in bands.nonzero().tolist()]
    rng.shuffle(active)
    chosen, taken = [], set()
    for band in (*range(N_BANDS, 0, -1), *MORE):
        of_band = (place for place in active if place.band == band)
        chosen += first_new(of_band, taken, lambda place: (place.prompt, context(place.prompt, place.at)))
    return chosen if len(chosen) == N_SHOWN else None


def asked_passages(
    bands: Int[Tensor, "prompts context"], tokens: Int[Tensor, "prompts context"], rng: random.Random
) -> list[Passage] | None:
    """Ten passages in random order, or None if there are too few; no two are from the same prompt, no two are equal.

    The latent fires on some of them, which come from the bands in turn, and not on the others.
    """
    texts = windows(tokens)
    by_band: list[list[Passage]] = [[] for _ in range(N_BANDS + 1)]
    for prompt, strongest in enumerate(windows(bands).amax(dim=2).tolist()):
        for window, band in enumerate(strongest):
            by_band[band].append(Passage(prompt, window, band))
    for of_band in by_band:
        rng.shuffle(of_band)

    def keys(passage: Passage) -> tuple[Hashable, ...]:
        return passage.prompt, tuple(texts[passage.prompt, passage.window].tolist())

    n_positive = rng.randint(*N_POSITIVE)
    in_turn = itertools.cycle(rng.sample(range(1, N_BANDS + 1), N_BANDS))
    chosen, taken = [], set()
    for band in [*itertools.islice(in_turn, n_positive), *[0] * (N_PASSAGES - n_positive)]:
        chosen += first_new(by_band[band], taken, keys)
    rng.shuffle(chosen)
    return chosen if len(chosen) == N_PASSAGES else None


def first_new(
    candidates: Iterable[Candidate], taken: set[Hashable], keys: Callable[[Candidate], Iterable[Hashable]]
) -> list[Candidate]:
    """The first candidate with no key in `taken`, to which its keys are added; an empty list if there is none."""
    for candidate in candidates:
        if not taken.intersection(keys(candidate)):
            taken.update(keys(candidate))
            return [candidate]
    return []
