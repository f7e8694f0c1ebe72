import pytest
import torch
from helpers import D_IN, activations

import sae_lens_sampled.step.auxiliary
from sae_lens_sampled.step.auxiliary import auxiliary_loss, by_entries, dead_latents, dead_reconstruction
from sae_lens_sampled.step.sparse_codes import Weights

N_LATENTS, K_AUX = 60, 6


def weights_of(rescale, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = ((D_IN, N_LATENTS), (N_LATENTS,), (N_LATENTS, D_IN))
    drawn = [torch.randn(shape, generator=generator, dtype=dtype).mul(0.3).requires_grad_() for shape in shapes]
    return Weights(*drawn, drawn[2].norm(dim=1).detach() if rescale else None)


@pytest.fixture(params=["dense products", "sparse entries"])
def way(request, monkeypatch):
    monkeypatch.setattr(sae_lens_sampled.step.auxiliary, "MIN_DEAD", 10**9 if request.param == "dense products" else 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("n_dead", [5, 30])
def test_dead_latents_reconstruct_as_in_plain_loops(monkeypatch, n_dead, rescale):
    monkeypatch.setitem(sae_lens_sampled.step.chunks.CHUNK_BYTES, "cpu", 1)
    weights, x, dead = weights_of(rescale), activations(50), torch.arange(7, 7 + n_dead)
    k_aux = min(K_AUX, n_dead)
    got = dead_reconstruction(x, weights, dead, None, k_aux)
    hidden_pre = (x @ weights.W_enc + weights.b_enc).tolist()
    scale = weights.norms.tolist() if rescale else [1.0] * N_LATENTS
    for row, values in zip(got.tolist(), hidden_pre, strict=True):
        chosen = sorted(dead.tolist(), key=lambda j: -values[j] * scale[j])[:k_aux]
        want = [sum(values[j] * weights.W_dec[j, i].item() for j in chosen) for i in range(D_IN)]
        assert row == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rescale", [True, False])
def test_gradients_are_those_of_differences(rescale):
    weights, dead = weights_of(rescale, torch.double), torch.arange(4, 13)
    x = activations(20).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, *some: dead_reconstruction(x, Weights(*some, weights.norms), dead, None, 4), (x, *weights[:3])
    )


def test_the_loss_by_hand():
    """Squared errors 5 and 1: mean 3. One dead latent over w / 2 = 2: factor 0.5. w = 4 over 2 dimensions: factor 2."""
    got = auxiliary_loss(torch.tensor([[1.0, 2], [0, 1]]), torch.zeros(2, 2), n_dead=1, width=4, coefficient=0.1)
    assert got == pytest.approx(0.1 * 3 * 0.5 * 2)
    assert auxiliary_loss(None, torch.zeros(2, 2), 0, 4, 0.1) == 0


def test_the_dead_latents_are_indices_in_order():
    mask = torch.tensor([False, True, False, True])
    assert dead_latents(mask, 2).tolist() == [1, 3]
    none = dead_latents(None, 0)
    assert (none.tolist(), none.dtype) == ([], torch.int64)


def test_entries_pay_on_a_cpu_where_dead_latents_are_more_than_eight_times_as_many_as_are_kept():
    assert [by_entries(n_dead, 10, torch.device("cpu")) for n_dead in (80, 81)] == [False, True]
    assert not by_entries(1000, 10, torch.device("meta"))
