"""Scores and changes to the method that are tried on known features only."""

import itertools

import pytest
import torch
from helpers import D_IN, D_SAE, activations, step_input

from benchmark.variants import (
    VariantConfig,
    VariantSAE,
    mean_squared_cosine,
    winsorised_group,
)


def variant(**fields) -> VariantSAE:
    torch.manual_seed(0)
    return VariantSAE(VariantConfig(d_in=D_IN, d_sae=D_SAE, k=2, **fields))


def test_the_pool_grows_to_its_final_size():
    sae = variant(pool_factor=8, moving_steps=3, first_pool_factor=2)
    sizes = []
    for step in range(5):
        pool = sae.training_forward_pass(step_input(activations(16), step=step)).pool
        assert pool is not None
        sizes.append(pool.shape[1])
    assert sizes == [4, 8, 12, 16, 16]


def test_the_penalty_is_of_the_pooled_rows():
    plain, penalised = variant(pool_factor=3), variant(pool_factor=3, orthogonality=0.5)
    without, with_penalty = (sae.training_forward_pass(step_input(activations(16))) for sae in (plain, penalised))
    assert with_penalty.pool is not None
    rows = penalised.W_dec[with_penalty.pool[0]]
    cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.permutations(rows, 2)]
    want = sum(cosine**2 for cosine in cosines) / len(cosines)
    assert mean_squared_cosine(rows).item() == pytest.approx(float(want))
    assert (with_penalty.loss - without.loss).item() == pytest.approx(0.5 * float(want), rel=1e-4)


def test_a_score_winsorised_in_the_group_counts_nothing_above_the_groups_cutoff():
    acts = torch.tensor([[[9.0, 2.0, 0.0], [0.0, 2.0, 1.0]], [[4.0, 3.0, 0.0], [0.5, 0.0, 0.0]]])
    # A pool of 2 at factor 2 means k = 1, so a group of two tokens keeps two entries. The cutoffs are 2 and 3.
    assert winsorised_group(acts, 2, pool_factor=2).tolist() == [[4, 8, 1], [9.25, 9, 0]]
