"""Comparison of a step on the kept entries with the dense one."""

import copy

import torch
from helpers import D_IN, gradients, step_input

from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.column_scan import Batch

ALL = {"pool_factor": 200 / 3}
"""Config fields for a pool of all 200 latents."""


def an_sae(**fields):
    given = {"d_in": D_IN, "d_sae": 200, "k": 3, "pool_factor": 5, "step": "kept", **fields}
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(**given))
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.02)
    return sae


def step(sae, x, n_dead=0, number=0):
    given = step_input(x, step=number)
    given.dead_neuron_mask = torch.zeros(200, dtype=torch.bool)
    given.dead_neuron_mask[60 : 60 + n_dead] = True
    return sae.training_forward_pass(given)


def batch_of(x, weights, threshold, cfg):
    """The first batch of a run."""
    return Batch(x, weights, threshold, cfg, draw=torch.tensor(0), last_cutoff=torch.tensor(0.0))


def on_both_paths(sae, function):
    """The SAE and what `function` returned, for the step on the kept entries and for the dense one."""
    results = []
    for path in ("kept", "dense"):
        copied = copy.deepcopy(sae)
        copied.cfg.step = path
        output = function(copied)
        assert output.feature_acts.is_sparse == (path == "kept")
        results.append((copied, output))
    return results


def assert_equal_steps(kept, dense, **tolerance):
    (mine, got), (theirs, want) = kept, dense
    assert got.feature_acts.shape == want.feature_acts.shape
    torch.testing.assert_close(got.feature_acts.to_dense(), want.feature_acts, **tolerance)
    torch.testing.assert_close(got.sae_out, want.sae_out, **tolerance)
    torch.testing.assert_close(got.losses, want.losses, **tolerance)
    mine_gradients, their_gradients = gradients(mine, got), gradients(theirs, want)
    for name, gradient in mine_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], msg=name, **tolerance)
    for name, buffer in mine.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], msg=name)
