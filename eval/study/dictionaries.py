"""Stage `compare`: how much of an arm's dictionary recurs in another arm's, and in its own with another seed."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from sae_lens_sampled import SampledTopKTrainingSAE, load_checkpoint
from sae_lens_sampled.metrics import ActivationStatistics
from sae_lens_sampled.saebench import load_saes
from sae_lens_sampled.saebench.top_contexts import MAX_DENSITY, TopActivations, contexts_of
from sae_lens_sampled.similarity import OneWay, dictionary_similarity, max_cosines
from study.configs import Study
from study.plan import Arm, Unit
from study.storage import Storage
from study.text import CHUNK, text_activations
from study.training import language_model

PARTNER = 0.7
"""Decoder cosine above which a latent counts as found again."""
N_UNMATCHED = 4
"""Maximum number of latents without a partner that are stored per pair of arms."""


class Dictionary:
    """The decoder of one export, and which of its rows fire."""

    @torch.no_grad()
    def __init__(self, storage: Storage, unit: Unit, tokens: Tensor, x: Tensor) -> None:
        study = storage.study
        trained = load_checkpoint(storage.sae(unit), device=study.device)
        [exported] = load_saes([(unit.name, trained)], study.device)
        sae = exported.sae
        self.statistics = ActivationStatistics(sae.cfg.d_in, sae.cfg.d_sae, study.device)
        self.top = TopActivations(sae.cfg.d_sae, study.device)
        for token_chunk, chunk in zip(tokens.split(CHUNK), x.split(CHUNK), strict=True):
            acts = sae.encode(chunk)
            self.statistics.update(chunk, acts, sae.decode(acts))
            self.top.update(token_chunk, acts)
        self.live = self.statistics.counts.nonzero()[:, 0]
        self.all_rows, self.rows = sae.W_dec, sae.W_dec[self.live]
        self.tokenizer = language_model(study).tokenizer
        sampled = isinstance(trained, SampledTopKTrainingSAE)
        pool = trained.pool_record.pool if sampled else None
        self.pool_rows = self.rows if pool is None or pool.all() else self.all_rows[pool]


class Dictionaries:
    """The dictionaries of SAEs, each computed on first access."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._by_name: dict[str, Dictionary] = {}

    def __getitem__(self, unit: Unit) -> Dictionary:
        if unit.name not in self._by_name:
            self._by_name[unit.name] = Dictionary(self.storage, unit, *self._text)
        return self._by_name[unit.name]

    @cached_property
    def _text(self) -> tuple[Tensor, Tensor]:
        return text_activations(self.storage)


def compare(storage: Storage, dictionaries: Dictionaries, arm: Arm, other: Arm) -> None:
    """Compare two arms over pairs of SAEs with different seeds: SAEs of one seed start from the same weights."""
    pairs = [
        compare_pair(dictionaries[a], dictionaries[b]) | {"seeds": [a.seed, b.seed]}
        for a, b in _pairs(storage.study, arm, other)
    ]
    result: dict[str, Any] = {"arm": arm.name, "other_arm": other.name, "pairs": pairs, "device": storage.device}
    if arm != other:
        first, second = storage.study.seeds(2)
        result["unmatched"] = unmatched_contexts(dictionaries[Unit(arm, first)], dictionaries[Unit(other, second)])
    storage.comparisons.append(result)


def compare_pair(a: Dictionary, b: Dictionary) -> dict[str, Any]:
    """MMCS and matched mean |cosine| of live latents, MMCS of all latents, and the overlap of the latest pools.

    An SAE without pools has its live latents in place of the pool.
    """
    similarity = dictionary_similarity(a.rows, b.rows)
    of_all = max_cosines(a.all_rows, b.all_rows)
    return {
        "forward": one_way(similarity.forward, of_all.a),
        "backward": one_way(similarity.backward, of_all.b),
        "matched": similarity.matched,
        "n_live": [len(a.rows), len(b.rows)],
        "pool_overlap": overlap(a.pool_rows, b.pool_rows),
    }


def one_way(similarity: OneWay, cosines_of_all: Tensor) -> dict[str, float]:
    """How much of one dictionary recurs in another, for live latents; also MMCS of all latents."""
    return similarity._asdict() | {"mmcs_of_all": cosines_of_all.mean().item()}


def overlap(a: Float[Tensor, "n_a d_in"], b: Float[Tensor, "n_b d_in"]) -> float:
    """Jaccard similarity of two sets of latents, in [0, 1].

    Two latents are the same if their cosine is above `PARTNER`, and each is the same as at most one other: the pairing
    with the most pairs counts.
    """
    unit_a, unit_b = (torch.nn.functional.normalize(rows, dim=1) for rows in (a, b))
    same = csr_matrix((unit_a @ unit_b.T > PARTNER).cpu().numpy())
    n_pairs = int((maximum_bipartite_matching(same) >= 0).sum())
    return n_pairs / (len(a) + len(b) - n_pairs)


def unmatched_contexts(a: Dictionary, b: Dictionary) -> list[dict[str, Any]]:
    """The non-dense latents of `b` without a partner in `a` that carry most mass, with their contexts."""
    without_partner = max_cosines(b.rows, a.rows).a < PARTNER
    sparse = b.statistics.density[b.live] <= MAX_DENSITY
    latents = b.live[without_partner & sparse]
    by_mass = b.statistics.mass[latents].argsort(descending=True)
    return contexts_of(latents[by_mass[:N_UNMATCHED]], b.top, b.statistics, b.tokenizer)


def _pairs(study: Study, a: Arm, b: Arm) -> Iterator[tuple[Unit, Unit]]:
    seeds = study.seeds(min(a.n_seeds, b.n_seeds))
    for i in seeds:
        for j in seeds:
            if i < j or (i > j and a != b):
                yield Unit(a, i), Unit(b, j)
