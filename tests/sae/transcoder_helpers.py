"""Transcoders of a small nonlinear layer, and batches of its inputs and outputs."""

import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, randomise, step_input

from sae_lens_sampled import SampledTopKTranscoder, SampledTopKTranscoderConfig

D_OUT = 7
VARIANTS = [
    {},
    {"skip": True},
    {"pool_factor": 4},
    {"pool_factor": 4, "pool_group_size": 8, "skip": True},
    {"pool_factor": 2, "pool_sampling": "proportional"},
    {"rescale_acts_by_decoder_norm": False, "skip": True},
    {"matryoshka_widths": [10, 25, D_SAE], "skip": True},
    {"matryoshka_widths": [10, D_SAE], "pool_factor": 4, "pool_group_size": 8, "inner_loss_coefficient": 0.5},
]
variants = pytest.mark.parametrize("fields", VARIANTS, ids=str)


def transcoder(**fields):
    given = {"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "k": K, **fields}
    made = SampledTopKTranscoder(SampledTopKTranscoderConfig(**given))
    randomise(made)
    return made


def outputs(x):
    """Outputs of a nonlinear layer for inputs `x`."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(*shape, generator=generator) * 0.5 for shape in ((D_IN, 20), (20, D_OUT)))
    return (x.float() @ first).relu() @ second + 0.2


def batch(*shape, seed=0, dtype=torch.float32):
    x = activations(*shape, seed=seed)
    return torch.cat([x, outputs(x)], dim=-1).to(dtype)


def trained(n_steps=20, **fields):
    made = transcoder(**fields)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(n_steps):
        made.training_forward_pass(step_input(batch(64, seed=step), step=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made
