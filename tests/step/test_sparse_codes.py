import subprocess
import sys

import pytest
import torch

from sae_lens_sampled.step.sparse_codes import Entries, Weights, as_coo, encode_and_decode

N_TOKENS, SIZE_IN, N_LATENTS = 6, 3, 5
TOKENS = torch.tensor([0, 0, 1, 3, 3, 3, 5])
LATENTS = torch.tensor([1, 4, 0, 4, 2, 0, 1])  # in any order within a token; latent 3 and tokens 2 and 4 have none


def drawn(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.double) + 0.1).requires_grad_()


def codes_of(x, W_enc, b_enc, norms):
    """Entries with the values that a dense encoder gives."""
    with torch.no_grad():
        hidden_pre = Weights(W_enc, b_enc, W_enc.T, norms).hidden_pre(x)
    return Entries(hidden_pre[TOKENS, LATENTS], TOKENS, LATENTS)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("by_input_bias", [True, False])
def test_every_gradient_is_that_of_differences(rescale, by_input_bias):
    def function(x, input_bias, W_enc, b_enc, W_dec):
        norms = W_dec.norm(dim=1) if rescale else None
        inputs = (x.detach() if by_input_bias else x) - input_bias
        weights = Weights(W_enc, b_enc, W_dec, norms, input_bias if by_input_bias else None)
        codes, [reconstruction], _ = encode_and_decode(inputs, weights, codes_of(inputs, W_enc, b_enc, norms))
        return codes.values, reconstruction

    x = drawn(N_TOKENS, SIZE_IN)
    x = x.detach() if by_input_bias else x
    given = (x, drawn(SIZE_IN), drawn(SIZE_IN, N_LATENTS), drawn(N_LATENTS), drawn(N_LATENTS, SIZE_IN))
    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("inner_widths", [(), (2, 4)])
@pytest.mark.parametrize("rescale", [True, False])
def test_codes_of_dead_latents_beside_the_kept_give_what_they_give_alone(inner_widths, rescale):
    given = (drawn(N_TOKENS, SIZE_IN), drawn(SIZE_IN, N_LATENTS), drawn(N_LATENTS), drawn(N_LATENTS, SIZE_IN))
    x, W_enc, b_enc, W_dec = given
    weights = Weights(W_enc, b_enc, W_dec, W_dec.norm(dim=1) if rescale else None)
    kept = codes_of(x, W_enc, b_enc, weights.norms)
    dead = kept.at(torch.tensor([0, 3, 5]))  # a latent may be kept and dead on the same token

    together = encode_and_decode(x, weights, kept, inner_widths, dead)
    alone = encode_and_decode(x, weights, kept, inner_widths)
    dead_alone = encode_and_decode(x, weights, dead).reconstructions[0]
    got = (together.kept.values, together.reconstructions, together.of_dead)
    want = (alone.kept.values, alone.reconstructions, dead_alone)
    torch.testing.assert_close(got, want)
    losses = [sum((i + 1) * out.pow(3).sum() for i, out in enumerate(outputs)) for outputs in (got, want)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, given, retain_graph=True) for loss in losses))


def test_reconstruction_is_the_product_by_hand():
    W_enc, b_enc, W_dec = drawn(SIZE_IN, N_LATENTS), drawn(N_LATENTS), drawn(N_LATENTS, SIZE_IN)
    x = drawn(N_TOKENS, SIZE_IN)
    codes, [got], _ = encode_and_decode(x, Weights(W_enc, b_enc, W_dec, None), codes_of(x, W_enc, b_enc, None))
    want = [[0.0] * SIZE_IN for _ in range(N_TOKENS)]
    for value, token, latent in zip(*(column.tolist() for column in codes), strict=True):
        for i in range(SIZE_IN):
            want[token][i] += value * W_dec[latent, i].item()
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.double))


@pytest.mark.parametrize("n_tokens", [0, 4])
def test_no_entries_reconstruct_zero_with_gradients_of_zero(n_tokens):
    weights = Weights(drawn(SIZE_IN, N_LATENTS), drawn(N_LATENTS), drawn(N_LATENTS, SIZE_IN), None)
    none = Entries(torch.zeros(0, dtype=torch.double), TOKENS[:0], LATENTS[:0])
    codes, [reconstruction], _ = encode_and_decode(drawn(n_tokens, SIZE_IN), weights, none)
    assert torch.equal(reconstruction, torch.zeros(n_tokens, SIZE_IN, dtype=torch.double))
    (reconstruction.sum() + codes.values.sum()).backward()
    assert all((weight.grad == 0).all() for weight in weights[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_under_autocast_too(dtype):
    x, W_enc, b_enc, W_dec = (
        drawn(*shape).detach().to(dtype).requires_grad_() for shape in ((6, 3), (3, 5), (5,), (5, 3))
    )
    codes = codes_of(x, W_enc, b_enc, None)
    with torch.autocast("cpu", torch.bfloat16):
        _, [got], _ = encode_and_decode(x, Weights(W_enc, b_enc, W_dec, None), codes)
    assert got.dtype == torch.float32
    got.square().sum().backward()
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, W_enc, b_enc, W_dec)]
    acts = as_coo(codes, torch.Size([6, 5])).float().to_dense()
    hidden_pre = exact[0] @ exact[1] + exact[2]
    (torch.where(acts != 0, hidden_pre + (acts - hidden_pre).detach(), 0) @ exact[3]).square().sum().backward()
    for mine, want in zip((x, W_enc, b_enc, W_dec), exact, strict=True):
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.float(), want.grad, rtol=0.01, atol=0.01)


def test_users_see_no_warning_of_torch():
    script = (
        "import torch; from sae_lens_sampled.step.sparse_codes import *; w = torch.ones(2, 3, requires_grad=True);"
        "e = Entries(torch.ones(1), torch.tensor([1]), torch.tensor([2]));"
        "a = torch.ones(4, 2, requires_grad=True);"
        "encode_and_decode(a, Weights(w, torch.zeros(3), w.T, None), e).reconstructions.sum().backward()"
    )
    run = subprocess.run([sys.executable, "-W", "always::UserWarning", "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
