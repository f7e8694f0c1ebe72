"""Whether the latent of a parent feature goes silent when a child feature fires, on data with known features."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.synthetic import HierarchyNode, SyntheticModel
from sae_lens.util import cosine_similarities, temporary_seed

from study.known_features import sample_with_features

MIN_COSINE = 0.6
"""Cosine between a decoder row and a feature above which the latent counts as the feature's."""
SEED = 1
"""Seed of the samples, which differ from those of other metrics."""


@torch.no_grad()
def true_absorption(sae: SAE[Any], data: SyntheticModel, n_samples: int, batch_size: int) -> dict[str, float]:
    """How much less often the latents of parents fire on their feature while a child of it is active.

    A parent is a feature with children in the hierarchy of the data; children are active only where their parent is.
    Its latent is the one whose decoder row has the largest cosine with it, if that is above `MIN_COSINE`. Of such a
    parent, over samples in which it is active:

    - recall with a child: among the samples with an active child, the share on which the latent fires;
    - recall without a child: the same share among the samples without one;
    - absorbed: recall without a child minus recall with a child. 1: any child silences the latent, which then means
      "the parent but none of its children", while the latents of children have absorbed the parent. 0: children make no
      difference. Below 0: the latent fires more often with them.

    Returns means over the parents that have a latent and were seen both with a child and without one, and the number of
    these parents; only the number if it is 0. This is not SAEBench's absorption, which trains probes for first letters
    on a language model and looks for latents that stand in for those that the probe selects; the measure here needs no
    probes and no wide model. It says nothing about parents without a latent, about which other latents fire, or how
    strongly. For a latent that never fires, both recalls and absorbed are 0.
    """
    assert data.hierarchy is not None
    children = children_of(data.hierarchy.roots)
    cosines = cosine_similarities(sae.W_dec, data.feature_dict.feature_vectors[list(children)])
    largest, latents = cosines.max(dim=0)
    parents = [parent for parent, cosine in zip(children, largest.tolist(), strict=True) if cosine > MIN_COSINE]
    if not parents:
        return {"parents_with_latent": 0}
    latents = latents[largest > MIN_COSINE]
    most = max(len(children[parent]) for parent in parents)
    repeated = torch.tensor([(children[parent] * most)[:most] for parent in parents], device=latents.device)
    n_active, n_fired = torch.zeros(2, 2, len(parents), dtype=torch.int64, device=latents.device)
    with temporary_seed(SEED):
        for done in range(0, n_samples, batch_size):
            x, features = sample_with_features(data, min(batch_size, n_samples - done))
            fires, active = sae.encode(x)[:, latents] != 0, features > 0
            has_child = active[:, repeated].any(dim=-1)
            for row, kind in enumerate((has_child, ~has_child)):
                of_kind = active[:, parents] & kind
                n_active[row] += of_kind.sum(dim=0)
                n_fired[row] += (of_kind & fires).sum(dim=0)
    seen = (n_active > 0).all(dim=0)
    if not seen.any():
        return {"parents_with_latent": 0}
    with_child, without_child = (n_fired[:, seen].double() / n_active[:, seen]).mean(dim=1).tolist()
    return {
        "parents_with_latent": int(seen.sum()),
        "recall_with_child": with_child,
        "recall_without_child": without_child,
        "absorbed": without_child - with_child,
    }


def children_of(roots: Sequence[HierarchyNode]) -> dict[int, list[int]]:
    """Children of every feature that has some; the children of a node without a feature count as its parent's."""
    children: dict[int, list[int]] = {}
    for node in _nodes(roots):
        below = list(_features_below(node))
        if node.feature_index is not None and below:
            children[node.feature_index] = below
    return children


def _nodes(roots: Sequence[HierarchyNode]) -> Iterator[HierarchyNode]:
    for node in roots:
        yield node
        yield from _nodes(node.children)


def _features_below(node: HierarchyNode) -> Iterator[int]:
    for child in node.children:
        if child.feature_index is not None:
            yield child.feature_index
        else:
            yield from _features_below(child)
