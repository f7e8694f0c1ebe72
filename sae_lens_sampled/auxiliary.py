"""AuxK (Gao et al., arXiv 2406.04093) on the dead columns alone: SAELens' auxiliary loss without its dense cost."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

ROW_CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Pre-activations of dead latents that are held at a time."""


def dead_reconstruction(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in n_dead"],
    b_enc: Float[Tensor, " n_dead"],
    W_dec: Float[Tensor, "n_dead d_in"],
    norms: Float[Tensor, " n_dead"] | None,
    k_aux: int,
) -> Float[Tensor, "tokens d_in"]:
    """The reconstruction from the `k_aux` largest pre-activations of each token, with gradient.

    All arguments are of the dead latents alone. As in SAELens there is no relu, and no decoder bias. Decoder norms
    decide what is largest; otherwise they cancel between encoder and decoder, in the gradient too.

    Memory: the chosen entries, and one chunk of rows; the backward pass chooses nothing anew.
    """
    if W_enc.shape[1] <= k_aux:
        return (x @ W_enc + b_enc) @ W_dec
    return _DeadReconstruction.apply(x, W_enc, b_enc, W_dec, norms, k_aux)


class _DeadReconstruction(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, norms: Tensor | None, k_aux: int):
        values, indices, reconstructions = [], [], []
        for rows in x.split(_row_chunk(x, W_enc)):
            hidden_pre = rows @ W_enc + b_enc
            order = hidden_pre if norms is None else hidden_pre * norms
            chosen = order.topk(k_aux, dim=1, sorted=False).indices
            values.append(hidden_pre.gather(1, chosen))
            indices.append(chosen.int())
            reconstructions.append(_spread(values[-1], chosen, hidden_pre.shape[1]) @ W_dec)
        ctx.save_for_backward(x, W_enc, W_dec, torch.cat(values), torch.cat(indices))
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return torch.cat(reconstructions)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, values, indices = ctx.saved_tensors
        [gradient] = gradients
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dW_enc, dW_dec = torch.zeros_like(W_enc), torch.zeros_like(W_dec)
        db_enc = W_enc.new_zeros(W_enc.shape[1])
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype, enabled):
            step = _row_chunk(x, W_enc)
            for start in range(0, len(x), step):
                part = slice(start, start + step)
                g, chosen = gradient[part], indices[part].long()
                dW_dec += _spread(values[part], chosen, len(W_dec)).T @ g
                dhidden_pre = _spread((g @ W_dec.T).gather(1, chosen), chosen, len(W_dec))
                dW_enc += x[part].T @ dhidden_pre
                db_enc += dhidden_pre.sum(dim=0)
                if dx is not None:
                    dx[part] = dhidden_pre @ W_enc.T
        return dx, dW_enc, db_enc, dW_dec, None, None


def random_rows(noise: Float[Tensor, " tokens"], fraction: float) -> Int[Tensor, " rows"]:
    """A uniformly random subset of `fraction` of the rows, at least one: those with the largest `noise`."""
    return noise.topk(max(1, round(fraction * len(noise)))).indices


def _spread(values: Tensor, indices: Tensor, width: int) -> Tensor:
    """Rows of `width` with `values` at `indices` and 0 elsewhere."""
    return values.new_zeros(len(values), width).scatter_(1, indices, values)


def _row_chunk(x: Tensor, W_enc: Tensor) -> int:
    budget = ROW_CHUNK_BYTES.get(x.device.type, ROW_CHUNK_BYTES["cuda"])
    return max(16, budget // (4 * W_enc.shape[1]))
