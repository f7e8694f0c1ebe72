"""The two ends of the family: BatchTopK, bit for bit, and per-token TopK."""

import contextlib

import pytest
import torch
from helpers import D_SAE, K, activations, batchtopk_sae, gradients, randomise, sampled_sae, step_input
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig


def autocast(enabled: bool):
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()


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
    """Activations, losses, every gradient and weight, the threshold: over 20 steps of training with dead latents."""
    if "k" in fields:
        pool_factor = max(pool_factor, D_SAE / fields["k"])
    shared = {name: fields[name] for name in fields if not name.startswith("pool") and name != "score"}
    ours, theirs = sampled_sae(pool_factor=pool_factor, **fields), batchtopk_sae(**shared)
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in (ours, theirs)]
    for step in range(20):
        batch = activations(31, seed=step)
        with autocast(bfloat16):
            mine, want = (sae.training_forward_pass(step_input(batch, n_dead=step % 9)) for sae in (ours, theirs))
        assert torch.equal(mine.feature_acts, want.feature_acts)
        assert torch.equal(mine.hidden_pre, want.hidden_pre)
        assert torch.equal(mine.sae_out, want.sae_out)
        assert torch.equal(mine.loss, want.loss)
        assert mine.losses.keys() == want.losses.keys()
        assert all(torch.equal(mine.losses[name], want.losses[name]) for name in want.losses)
        mine_grad, want_grad = gradients(ours, mine), gradients(theirs, want)
        assert mine_grad.keys() == want_grad.keys()
        assert all(torch.equal(mine_grad[name], want_grad[name]) for name in want_grad)
        assert torch.equal(ours.topk_threshold, theirs.topk_threshold)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(ours.encode(batch), theirs.encode(batch))


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
    """The equalities above can fail: 13 of 40 latents are another SAE."""
    ours, theirs = sampled_sae(pool_factor=13 / K), batchtopk_sae()
    assert not torch.equal(ours.encode(activations(31)), theirs.encode(activations(31)))
