"""The two limiting cases of the family: BatchTopK, bit for bit, and per-token TopK."""

import pytest
import torch
from helpers import (
    D_SAE,
    K,
    activations,
    assert_equal_training,
    batchtopk_sae,
    gradients,
    randomise,
    sampled_sae,
    step_input,
)
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig


@pytest.mark.conformance(8)
@pytest.mark.parametrize("pool_factor", [D_SAE / K, D_SAE / K + 5, 13.2])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"pool_group_size": 7, "score": "entropy"},
        {"pool_sampling": "proportional"},
        {"k": 2.7},
        {"apply_b_dec_to_input": False},
    ],
    ids=str,
)
def test_a_pool_of_all_latents_is_batchtopk_to_the_last_bit(pool_factor, bfloat16, fields):
    """Activations, losses, all gradients and weights, and the threshold, over 20 training steps with dead latents."""
    if "k" in fields:
        pool_factor = max(pool_factor, D_SAE / fields["k"])
    shared = {name: fields[name] for name in fields if not name.startswith("pool") and name != "score"}
    ours, theirs = sampled_sae(pool_factor=pool_factor, **fields), batchtopk_sae(**shared)
    assert_equal_training(ours, theirs, bfloat16)
    assert torch.equal(ours.encode(activations(31)), theirs.encode(activations(31)))


@pytest.mark.parametrize("rescale", [True, False])
def test_one_token_groups_with_k_candidates_are_per_token_topk(rescale):
    ours = sampled_sae(pool_group_size=1, pool_factor=1, rescale_acts_by_decoder_norm=rescale)
    cfg = TopKTrainingSAEConfig(
        d_in=12, d_sae=D_SAE, k=K, aux_loss_coefficient=1 / 32, rescale_acts_by_decoder_norm=rescale
    )
    theirs = TopKTrainingSAE(cfg)
    randomise(theirs)
    mine, want = (sae.training_forward_pass(step_input(activations(50), n_dead=6)) for sae in (ours, theirs))
    assert torch.equal(mine.feature_acts, want.feature_acts)
    assert torch.equal(mine.loss, want.loss)
    mine_grad, want_grad = gradients(ours, mine), gradients(theirs, want)
    assert all(torch.equal(mine_grad[name], want_grad[name]) for name in want_grad)


def test_a_smaller_pool_is_not_batchtopk():
    """The equalities above can fail: a pool of 13 of 40 latents gives a different SAE."""
    ours, theirs = sampled_sae(pool_factor=13 / K), batchtopk_sae()
    assert not torch.equal(ours.encode(activations(31)), theirs.encode(activations(31)))
