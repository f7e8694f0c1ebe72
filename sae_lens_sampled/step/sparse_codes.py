"""A sparse autoencoder's codes as a sparse matrix: decoding, and all gradients, from k entries a token.

The products are torch's of CSR matrices (MKL on a CPU, cuSPARSE on CUDA), each k / d_sae of the dense one.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override


class Weights(NamedTuple):
    """What encodes and decodes."""

    W_enc: Float[Tensor, "d_in latents"]
    b_enc: Float[Tensor, " latents"]
    W_dec: Float[Tensor, "latents d_out"]
    norms: Float[Tensor, " latents"] | None
    r"""Norms of the decoder rows, where these rescale the pre-activations. They decide what is chosen and are a factor
    of activations, but cancel in the reconstruction: $(z \|w\|)(w / \|w\|) = z w$ needs no gradient of them."""
    input_bias: Float[Tensor, " d_in"] | None = None
    r"""What was subtracted from the inputs, where its gradient is wanted but not theirs: it is $-W_{enc} \partial b$,
    a vector in place of their matrix."""

    def of(self, latents: Int[Tensor, " some"] | slice) -> "Weights":
        """Those of some latents, copies or views, with gradient; for dense products, which need no `input_bias`."""
        norms = None if self.norms is None else self.norms[latents]
        if isinstance(latents, slice):
            return Weights(self.W_enc[:, latents], self.b_enc[latents], self.W_dec[latents], norms)
        W_enc, W_dec = self.W_enc.index_select(1, latents), self.W_dec.index_select(0, latents)
        return Weights(W_enc, self.b_enc[latents], W_dec, norms)

    def hidden_pre(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens latents"]:
        """Pre-activations, rescaled where decoder norms rescale them."""
        hidden_pre = x @ self.W_enc + self.b_enc
        return hidden_pre if self.norms is None else hidden_pre * self.norms


class Entries(NamedTuple):
    """Some entries of a (tokens, d_sae) matrix."""

    values: Float[Tensor, " entries"]
    tokens: Int[Tensor, " entries"]
    latents: Int[Tensor, " entries"]

    def at(self, places: Tensor | slice) -> "Entries":
        """Some of them, by index, mask or range."""
        return Entries(*(column[places] for column in self))


def has_kernels(device: torch.device) -> bool:
    """Whether torch has CSR products for `device`."""
    return device.type == "cuda" or (device.type == "cpu" and torch.backends.mkl.is_available())


def encode_and_decode(
    x: Float[Tensor, "tokens d_in"], weights: Weights, codes: Entries, inner_widths: Sequence[int] = ()
) -> tuple[Entries, Float[Tensor, "levels tokens d_out"]]:
    r"""The codes with their gradient, and the reconstructions from them: those of inner widths, and of all latents.

    For codes $S$ with $s_{ij} = x_i \cdot W_{enc,j} + b_j$ at the entries and 0 elsewhere it is $\hat X = S W_{dec}$.
    With $G = \partial L / \partial \hat X$ and $D = G W_{dec}^T$ at the entries: $\partial W_{dec} = S^T G$,
    $\partial W_{enc} = X^T D$, $\partial b = D^T 1$, $\partial X = D W_{enc}^T$. All in float32 at least, under
    autocast too: there are no such products in less.

    Args:
        x: inputs.
        weights: of all latents.
        codes: the entries as encoding gives them, with decoder norms where these rescale; ascending by token and then
            by latent.
        inner_widths: numbers of latents, from the first on, that have a reconstruction of their own; increasing.
    """
    order = codes.latents.argsort(stable=True)
    values, norms = codes.values, weights.norms
    if norms is not None:
        # A latent whose decoder row is 0 has only zeros here; 0 / 0 would be NaN.
        values = values / norms.detach().clamp(min=torch.finfo(norms.dtype).tiny)[codes.latents]
    x = x if weights.input_bias is None else x.detach()
    values = _Encode.apply(x, weights.W_enc, weights.b_enc, weights.input_bias, values, *codes[1:], order)
    kept = codes._replace(values=values if norms is None else values * norms[codes.latents])
    if not inner_widths:
        return kept, _Decode.apply(values, weights.W_dec, *codes[1:], order, len(x))[None]
    # A level is a block of rows: what it adds to every token, in the same products.
    levels = level_of(codes.latents, inner_widths)
    by_level = levels.argsort(stable=True)
    rows, latents = (levels * len(x) + codes.tokens)[by_level], codes.latents[by_level]
    n_rows = (len(inner_widths) + 1) * len(x)
    added = _Decode.apply(values[by_level], weights.W_dec, rows, latents, latents.argsort(stable=True), n_rows)
    return kept, added.unflatten(0, (-1, len(x))).cumsum(dim=0)


def level_of(latents: Int[Tensor, " some"], inner_widths: Sequence[int]) -> Int[Tensor, " some"]:
    """Level that each latent belongs to: 0 for the first `inner_widths[0]`, and so on."""
    ends = torch.tensor(inner_widths, device=latents.device)
    return torch.bucketize(latents, ends, right=True)


def as_coo(entries: Entries, shape: torch.Size) -> Tensor:
    """Entries, ascending by token and then by latent, as a coalesced COO tensor (..., d_sae) with their gradient."""
    leading, rest = [], entries.tokens  # torch.unravel_index would copy the shape to the device, and wait for it
    for size in reversed(shape[:-1]):
        leading.insert(0, rest % size)
        rest = rest // size
    indices = torch.stack([*leading, entries.latents])
    return torch.sparse_coo_tensor(indices, entries.values, shape, is_coalesced=True, check_invariants=False)


@torch.no_grad()
def products_at(
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "columns d"],
    rows: Int[Tensor, " entries"],
    columns: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """Entries of $A B^T$, ascending by row."""
    pattern = _csr(a.new_zeros(len(rows)), rows, columns, (len(a), len(b)))
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0).values()


class _Encode(torch.autograd.Function):
    """The caller knows the values already; only the backward pass has something to compute."""

    @staticmethod
    @override
    def forward(ctx: Any, x, W_enc, b_enc, input_bias, values, tokens, latents, order) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_enc, tokens, latents, order)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, b_enc, tokens, latents, order = ctx.saved_tensors
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        dx, dinput_bias, gradient = None, None, gradient.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            transposed = _csr(gradient[order], latents[order], tokens[order], (len(b_enc), len(x)))
            dW_enc = _product(transposed, x.to(dtype)).T.to(W_enc.dtype)
            db_enc = gradient.new_zeros(len(b_enc)).index_add_(0, latents, gradient)
            if ctx.needs_input_grad[0]:
                dx = _csr(gradient, tokens, latents, (len(x), len(b_enc))) @ W_enc.T.to(dtype)
            if ctx.needs_input_grad[3]:
                dinput_bias = -(W_enc @ db_enc.to(W_enc.dtype))
        return None if dx is None else dx.to(x.dtype), dW_enc, db_enc.to(b_enc.dtype), dinput_bias, *(None,) * 4


class _Decode(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, values, W_dec, tokens, latents, order, n_tokens) -> Tensor:
        ctx.save_for_backward(values, W_dec, tokens, latents, order)
        dtype = torch.promote_types(values.dtype, torch.float32)
        with torch.autocast(values.device.type, enabled=False):
            return _product(_csr(values.to(dtype), tokens, latents, (n_tokens, len(W_dec))), W_dec.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, W_dec, tokens, latents, order = ctx.saved_tensors
        gradient, tokens, latents = gradient.contiguous(), tokens[order], latents[order]
        with torch.autocast(values.device.type, enabled=False):
            exact, rows = values.to(gradient.dtype), W_dec.to(gradient.dtype)
            # By latent, whose row of the decoder then stays in the cache: a third of the time.
            dvalues = torch.empty_like(exact).scatter_(0, order, products_at(rows, gradient, latents, tokens))
            dW_dec = _product(_csr(exact[order], latents, tokens, (len(W_dec), len(gradient))), gradient)
        return dvalues.to(values.dtype), dW_dec.to(W_dec.dtype), *(None,) * 4


def _product(sparse: Tensor, dense: Tensor) -> Tensor:
    """As `sparse @ dense`, which first writes zeros, and copies them: two passes over the result."""
    result = dense.new_empty(sparse.shape[0], dense.shape[1])
    return torch.addmm(result, sparse, dense, beta=0, out=result)


def _csr(values: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, ...]) -> Tensor:
    _silence_first_warnings()
    starts = torch.searchsorted(rows, torch.arange(size[0] + 1, device=rows.device))
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


@functools.cache
def _silence_first_warnings() -> None:
    # torch says once in a process that CSR tensors are in beta, at the first that is made: this one. Torch 2.11 says
    # there too that invariants are not checked, whatever `check_invariants` is.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(beta state|invariant checks)", category=UserWarning)
        starts, empty = torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(starts, empty, torch.zeros(0), (1, 1), check_invariants=False)
