"""Stage `compare`: how much of one arm's dictionary is found again in another's, and in its own with another seed."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lens_sampled import SampledTopKTrainingSAE, load_checkpoint
from sae_lens_sampled.activation_statistics import ActivationStatistics
from sae_lens_sampled.dictionary_similarity import dictionary_similarity, max_cosines
from sae_lens_sampled.saebench import load_saes
from sae_lens_sampled.saebench.top_contexts import MAX_DENSITY, TopActivations, contexts_of
from studies.plan import Arm, Unit
from studies.storage import Storage
from studies.text import held_out, text_activations
from studies.training import language_model

PARTNER = 0.7
"""Decoder cosine from which on a latent counts as found again."""
N_UNMATCHED = 4
POOL_MEMORY = 100
"""Steps at the end of training whose pools count."""
BATCH = 4096


class Dictionaries:
    """What is known of the live latents of SAEs, worked out when it is first asked for."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._found: dict[str, Dictionary] = {}

    def __getitem__(self, unit: Unit) -> "Dictionary":
        if unit.name not in self._found:
            self._found[unit.name] = Dictionary(self.storage, unit, *self._text)
        return self._found[unit.name]

    @cached_property
    def _text(self) -> tuple[Tensor, Tensor]:
        return text_activations(self.storage, held_out(self.storage), self.storage.study.held_out_tokens)


class Dictionary:
    """The live latents of one export."""

    @torch.no_grad()
    def __init__(self, storage: Storage, unit: Unit, tokens: Tensor, x: Tensor) -> None:
        study = storage.study
        [loaded] = load_saes([(unit.name, storage.sae(unit))], study.device)
        sae = loaded.sae
        self.statistics = ActivationStatistics(study.d_in, study.d_sae, study.device)
        self.top = TopActivations(study.d_sae, study.device)
        for some, part in zip(tokens.split(BATCH), x.split(BATCH), strict=True):
            acts = sae.encode(part)
            self.statistics.update(part, acts, sae.decode(acts))
            self.top.update(some, acts)
        self.live = self.statistics.counts.nonzero()[:, 0]
        self.rows = sae.W_dec[self.live]
        self.tokenizer = language_model(study.model, study.device).tokenizer
        trained = load_checkpoint(storage.sae(unit), device=study.device)
        self.pooled = torch.ones_like(self.live, dtype=torch.bool)
        if isinstance(trained, SampledTopKTrainingSAE):
            self.pooled = trained.pool_record.pooled_within(POOL_MEMORY)[self.live]


def compare(storage: Storage, found: Dictionaries, a: Arm, b: Arm) -> None:
    """Compare two arms, seed by seed; never SAEs of one seed, which start from the same weights."""
    pairs = [compare_pair(found[one], found[other]) | {"seeds": [one.seed, other.seed]} for one, other in _pairs(a, b)]
    result: dict[str, Any] = {"arms": [a.name, b.name], "pairs": pairs}
    if a != b:
        result["unmatched"] = unmatched_contexts(found[Unit(a, 0)], found[Unit(b, 1)])
    storage.save(storage.comparison(a, b), result)


def compare_pair(a: Dictionary, b: Dictionary) -> dict[str, Any]:
    """MMCS and matched mean |cosine| over live latents, and how far the latest pools are the same latents."""
    similarity = dictionary_similarity(a.rows, b.rows)
    rows, columns = linear_sum_assignment(_cosines(a.rows, b.rows).numpy(), maximize=True)
    in_a, in_b = a.pooled.cpu()[rows], b.pooled.cpu()[columns]
    return {
        "forward": similarity.forward._asdict(),
        "backward": similarity.backward._asdict(),
        "matched": similarity.matched,
        "n_live": [len(a.rows), len(b.rows)],
        "pool_overlap": ((in_a & in_b).sum() / (in_a | in_b).sum().clamp(min=1)).item(),
    }


def unmatched_contexts(a: Dictionary, b: Dictionary) -> list[dict[str, Any]]:
    """The latents of `b` without a partner in `a` that carry most mass and are not dense, with text to read."""
    found = max_cosines(b.rows, a.rows).a < PARTNER
    found &= b.statistics.density[b.live] <= MAX_DENSITY
    latents = b.live[found]
    by_mass = b.statistics.mass[latents].argsort(descending=True)
    return contexts_of(latents[by_mass[:N_UNMATCHED]], b.top, b.statistics, b.tokenizer)


def _pairs(a: Arm, b: Arm) -> Iterator[tuple[Unit, Unit]]:
    shared = min(a.n_seeds, b.n_seeds)
    for i in range(shared):
        for j in range(shared):
            if i < j or (i > j and a != b):
                yield Unit(a, i), Unit(b, j)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    unit_a, unit_b = (torch.nn.functional.normalize(rows.float(), dim=1) for rows in (a, b))
    return (unit_a @ unit_b.T).abs().cpu()
