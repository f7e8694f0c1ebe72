"""Which latents' gradients ranks exchange, and when."""

import torch
from helpers import activations, sampled_sae, step_input

from sae_lens_sampled.sae.gradient_sum import GradientSum
from sae_lens_sampled.step.ranks import Ranks


class Noted(Ranks):
    """One process that notes what it exchanges."""

    def __init__(self):
        self.sizes = []

    def mean(self, x):
        self.sizes.append(tuple(x.shape))
        return x


def an_sae():
    sae, ranks = sampled_sae(pool_factor=3, pool_group_size=8, aux_loss_coefficient=0.0), Noted()
    sae._gradient_sum = GradientSum(sae, ranks)
    return sae, ranks


def pooled(sae, x):
    before = sae.pool_record.last_pooled.clone()
    output = sae.training_forward_pass(step_input(x))
    return output.loss, (sae.pool_record.last_pooled != before).nonzero()[:, 0]


def test_a_backward_pass_of_two_forward_passes_exchanges_the_latents_of_both():
    sae, ranks = an_sae()
    one, first = pooled(sae, activations(16, seed=1)[:, torch.arange(12)])
    two, second = pooled(sae, -activations(16, seed=2))
    (one + two).backward()
    both = torch.cat([first, second]).unique()
    assert torch.equal(sae._gradient_sum.active, both)
    assert len(both) > len(first)
    assert (len(both), 12) in ranks.sizes  # W_dec
    three, third = pooled(sae, activations(16, seed=3))
    three.backward()
    assert torch.equal(sae._gradient_sum.active, third)


def test_a_forward_pass_without_gradient_expects_none():
    sae, _ = an_sae()
    with torch.no_grad():
        pooled(sae, -activations(16, seed=2))
    loss, latents = pooled(sae, activations(16, seed=1))
    loss.backward()
    assert torch.equal(sae._gradient_sum.active, latents)


def test_a_parameter_that_is_frozen_later_is_not_waited_for():
    sae, ranks = an_sae()
    sae.b_dec.requires_grad_(False)
    loss, latents = pooled(sae, activations(16))
    loss.backward()
    assert len(ranks.sizes) == 3
    assert (12, len(latents)) in ranks.sizes  # W_enc
