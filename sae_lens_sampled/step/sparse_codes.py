"""A sparse autoencoder's codes as a sparse matrix: decoding, and all gradients, from k entries per token.

Each product (`products.py`) needs k / d_sae of the dense one's operations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from sae_lens_sampled.step.products import Pattern, products_for


class Weights(NamedTuple):
    """Encoder and decoder weights."""

    W_enc: Float[Tensor, "d_in latents"]
    b_enc: Float[Tensor, " latents"]
    W_dec: Float[Tensor, "latents d_out"]
    norms: Float[Tensor, " latents"] | None
    r"""Norms of the decoder rows, if these rescale the pre-activations. They affect the selection and scale the
    activations, but cancel in the reconstruction: $(z \|w\|)(w / \|w\|) = z w$ does not depend on them."""
    input_bias: Float[Tensor, " d_in"] | None = None
    r"""Bias subtracted from the inputs, if its gradient is needed but that of the inputs is not: the bias needs only
    $-W_{enc} \partial b$, a vector instead of a matrix."""

    def of(self, latents: Int[Tensor, " some"] | slice) -> "Weights":
        """Weights of some latents, with gradient: views if `latents` is a slice, else copies.

        `input_bias` is left out: the dense products for which these weights are used do not need it.
        """
        norms = None if self.norms is None else self.norms[latents]
        if isinstance(latents, slice):
            return Weights(self.W_enc[:, latents], self.b_enc[latents], self.W_dec[latents], norms)
        if self.W_enc.T.is_contiguous():  # whole rows, not strided columns
            W_enc = self.W_enc.T.index_select(0, latents).T
        else:
            W_enc = self.W_enc.index_select(1, latents)
        return Weights(W_enc, self.b_enc[latents], self.W_dec.index_select(0, latents), norms)

    def hidden_pre(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens latents"]:
        """Pre-activations, rescaled by the decoder norms if there are any."""
        hidden_pre = x @ self.W_enc + self.b_enc
        return hidden_pre if self.norms is None else hidden_pre * self.norms


class Entries(NamedTuple):
    """Some entries of a (tokens, d_sae) matrix."""

    values: Float[Tensor, " entries"]
    tokens: Int[Tensor, " entries"]
    latents: Int[Tensor, " entries"]

    def at(self, places: Tensor | slice) -> "Entries":
        """Select some entries by index, mask or slice."""
        return Entries(*(column[places] for column in self))


class Decoded(NamedTuple):
    """The codes and the reconstructions from them, with gradient."""

    kept: Entries
    """The codes."""
    reconstructions: Float[Tensor, "levels tokens d_out"]
    """From the latents of each inner width and, last, from all latents; without the decoder bias."""
    of_dead: Float[Tensor, "tokens d_out"] | None
    """Reconstruction from the codes of dead latents; None without these."""


def encode_and_decode(
    x: Float[Tensor, "tokens d_in"],
    weights: Weights,
    codes: Entries,
    inner_widths: Sequence[int] = (),
    dead: Entries | None = None,
) -> Decoded:
    r"""Attach the gradient to the codes, and reconstruct from them, for each inner width and from all latents.

    For codes $S$ with $s_{ij} = x_i \cdot W_{enc,j} + b_j$ at the entries and 0 elsewhere, $\hat X = S W_{dec}$ is the
    reconstruction. With $G = \partial L / \partial \hat X$ and $D = G W_{dec}^T$ at the entries: $\partial W_{dec} =
    S^T G$, $\partial W_{enc} = X^T D$, $\partial b = D^T 1$, $\partial X = D W_{enc}^T$. All at least in float32, even
    under autocast: not all of these products exist in lower precision.

    Reconstructions of inner widths and from dead latents are blocks of rows in the same products, so that the gradient
    of each weight is computed only once.

    Args:
        x: inputs.
        weights: weights of all latents.
        codes: the kept entries and their values, scaled by `weights.norms` if given; ordered by token.
        inner_widths: increasing; for each width w, the first w latents have their own reconstruction.
        dead: codes of dead latents, for AuxK, in the form of `codes`; no other reconstruction includes them.
    """
    n_tokens, n_kept, norms = len(x), len(codes.values), weights.norms
    values, rows, latents = codes
    if dead is not None:
        values, latents = torch.cat([values, dead.values]), torch.cat([latents, dead.latents])
        rows = torch.cat([rows, n_tokens + dead.tokens])
    if norms is not None:
        # A latent whose decoder row is 0 has only values of 0 here; 0 / 0 would be NaN.
        values = values / norms.detach().clamp(min=torch.finfo(norms.dtype).tiny)[latents]
    x = x if weights.input_bias is None else x.detach()
    pattern = Pattern(rows, latents, ((1 if dead is None else 2) * n_tokens, len(weights.b_enc)))
    values = _Encode.apply(x, weights.W_enc, weights.b_enc, weights.input_bias, values, pattern)
    acts = values[:n_kept].to(codes.values.dtype)  # values of dead latents may have higher precision
    kept = codes._replace(values=acts if norms is None else acts * norms[codes.latents])
    n_levels = len(inner_widths) + 1
    n_blocks = n_levels if dead is None else n_levels + 1
    if inner_widths:
        # Each level is a block of its contributions to all tokens; the block of the dead latents comes last.
        level = level_of(latents, inner_widths)
        rows = torch.where(rows < n_tokens, level * n_tokens, len(inner_widths) * n_tokens) + rows
        by_row = rows.argsort(stable=True)
        pattern = Pattern(rows[by_row], latents[by_row], (n_blocks * n_tokens, len(weights.b_enc)))
        values = values[by_row]
    decoded = _Decode.apply(values, weights.W_dec, pattern).unflatten(0, (n_blocks, n_tokens))
    reconstructions = decoded[:n_levels].cumsum(dim=0) if inner_widths else decoded[:1]
    return Decoded(kept, reconstructions, None if dead is None else decoded[-1])


def level_of(latents: Int[Tensor, " some"], inner_widths: Sequence[int]) -> Int[Tensor, " some"]:
    """Level that each latent belongs to: 0 for the first `inner_widths[0]` latents, and so on."""
    # Not by `bucketize`, which would copy the widths to the device and wait for it.
    return sum(((latents >= width).long() for width in inner_widths), torch.zeros_like(latents))


def as_coo(entries: Entries, shape: torch.Size) -> Tensor:
    """Entries, ordered by token and then by latent, as a coalesced COO tensor (..., d_sae) with their gradient."""
    leading, rest = [], entries.tokens  # torch.unravel_index would copy the shape to the device, and wait for it
    for size in reversed(shape[:-1]):
        leading.insert(0, rest % size)
        rest = rest // size
    indices = torch.stack([*leading, entries.latents])
    return torch.sparse_coo_tensor(indices, entries.values, shape, is_coalesced=True, check_invariants=False)


class _Encode(torch.autograd.Function):
    """The caller knows the values already; only the backward pass computes anything."""

    @staticmethod
    @override
    def forward(ctx: Any, x, W_enc, b_enc, input_bias, values, pattern) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_enc)
        ctx.pattern = pattern
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, W_enc, b_enc), pattern, products = ctx.saved_tensors, ctx.pattern, products_for(gradient)
        dx, dinput_bias = None, None
        with torch.autocast(x.device.type, enabled=False):
            n_blocks = pattern.shape[0] // max(len(x), 1) or 1  # each of len(x) rows
            inputs = x if n_blocks == 1 else x.repeat(n_blocks, 1)
            dW_enc = products.transposed_times(pattern, gradient, inputs).T.to(W_enc.dtype)
            db_enc = products.column_sums(pattern, gradient).to(b_enc.dtype)
            if ctx.needs_input_grad[0]:
                dx = products.times(pattern, gradient, W_enc.T)
                dx = dx.unflatten(0, (n_blocks, len(x))).sum(dim=0).to(x.dtype)
            if ctx.needs_input_grad[3]:
                dinput_bias = -(W_enc @ db_enc.to(W_enc.dtype))
        return dx, dW_enc, db_enc, dinput_bias, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, values, W_dec, pattern) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        with torch.autocast(values.device.type, enabled=False):
            return products_for(values).times(pattern, values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (values, W_dec), pattern, products = ctx.saved_tensors, ctx.pattern, products_for(gradient)
        gradient = gradient.contiguous()
        with torch.autocast(values.device.type, enabled=False):
            dvalues = products.at_entries(pattern, gradient, W_dec).to(values.dtype)
            dW_dec = products.transposed_times(pattern, values.to(gradient.dtype), gradient).to(W_dec.dtype)
        return dvalues, dW_dec, None
