"""Scores and changes to the method that are tried on known features only."""

import itertools

import pytest
import torch
from helpers import D_IN, D_SAE, activations, randomise, step_input

from benchmark.variants import (
    VariantConfig,
    VariantSAE,
    mean_squared_cosine,
    register_variants,
    winsorised_group,
)
from sae_lens_sampled.step.scores import goes_by_columns
from sae_lens_sampled.step.selection import column_statistics


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
    # Pool of 2 at factor 2: k is 1, so a group of two tokens keeps two; the second largest are 2 and 3.
    assert winsorised_group(acts, 2, pool_factor=2).tolist() == [[4, 8, 1], [9.25, 9, 0]]


def clipped_sums(acts: torch.Tensor, cutoff: float) -> list[float]:
    """By plain loops."""
    return [sum(min(value, cutoff) ** 2 for value in column) for column in acts.T.tolist()]


def best_latents(scores: list[float]) -> list[int]:
    """The pool of 16, ascending."""
    return sorted(sorted(range(D_SAE), key=lambda latent: -scores[latent])[:16])


@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("cutoff", [None, 0.0, 0.4])
def test_a_score_winsorised_at_the_last_cutoff_is_a_plain_sum(group_size, cutoff):
    register_variants()
    acts = activations(16).relu()  # the last group is a short one
    last_cutoff = None if cutoff is None else torch.tensor(cutoff)
    scores = column_statistics(acts, "winsorised_last", 4, group_size, last_cutoff).scores
    groups = acts.split(group_size or len(acts))
    want = torch.tensor([clipped_sums(group, cutoff or float("inf")) for group in groups])
    assert torch.allclose(scores, want)
    assert (want < torch.tensor([clipped_sums(group, float("inf")) for group in groups])).any() == (cutoff == 0.4)


@pytest.mark.parametrize("group_size", [None, 8])
def test_a_score_winsorised_at_the_last_cutoff_trains_on_the_kept_entries(group_size):
    register_variants()
    assert goes_by_columns("winsorised_last")
    kept, dense = (
        variant(pool_factor=8, pool_group_size=group_size, score="winsorised_last", step=step)
        for step in ("kept", "dense")
    )
    for sae in (kept, dense):
        randomise(sae)
    changed = False
    for step in range(3):
        batch = activations(32, seed=step)
        cutoff = dense.pool_record.cutoff.item() or float("inf")
        groups = dense.encode_with_hidden_pre(batch)[1].relu().split(group_size or len(batch))
        outputs = [sae.training_forward_pass(step_input(batch, step=step)) for sae in (kept, dense)]
        assert [output.path for output in outputs] == ["kept", "dense"]
        for output in outputs:
            assert output.pool is not None
            assert output.pool.tolist() == [best_latents(clipped_sums(group, cutoff)) for group in groups]
        changed |= any(
            best_latents(clipped_sums(group, cutoff)) != best_latents(clipped_sums(group, float("inf")))
            for group in groups
        )
        assert torch.allclose(outputs[0].loss, outputs[1].loss)
    assert changed
