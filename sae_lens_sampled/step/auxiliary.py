"""AuxK (Gao et al., arXiv 2406.04093) on the dead latents only: SAELens' auxiliary loss without its dense cost."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_sampled.step.chunks import chunk_length
from sae_lens_sampled.step.products import has_kernels
from sae_lens_sampled.step.sparse_codes import Entries, Weights, encode_and_decode
from sae_lens_sampled.step.triton import available

MIN_DEAD = 8
"""Ratio of the number of dead latents to the entries that each token keeps of these, up to which dense products are
used: the entries are then a large part of the matrix."""
MIN_DEAD_ON_GPU = 24
"""The same for kernels on a GPU. Calculated, not measured: dense float32 products at 60 TFLOP/s, reads at 5 TB/s."""


def auxiliary_loss(
    dead_reconstruction: Float[Tensor, "tokens d_out"] | None,
    residual: Float[Tensor, "tokens d_out"],
    n_dead: int,
    width: int,
    coefficient: float,
) -> Float[Tensor, ""]:
    r"""SAELens' AuxK, $c \min(n_{dead} / \lfloor w / 2 \rfloor, 1) \cdot \mathrm{mean} \|\hat e - e\|^2$; e: residual.

    The mean is over vectors of width w, as before reshaping: over single heads, if the encoder merges heads.
    """
    if dead_reconstruction is None:
        return residual.new_zeros(())
    squared_error = (dead_reconstruction - residual).square().sum(dim=-1).mean()
    return coefficient * min(n_dead / (width // 2), 1.0) * (width / residual.shape[-1]) * squared_error


def dead_latents(mask: Bool[Tensor, " d_sae"] | None, n_dead: int) -> Int[Tensor, " n_dead"]:
    """Ascending indices of the dead latents; since `n_dead` is given, there is no wait for the device."""
    return torch.zeros(0, dtype=torch.int64) if mask is None else torch.nonzero_static(mask, size=n_dead)[:, 0]


def by_entries(n_dead: int, k_aux: int, device: torch.device) -> bool:
    """Whether a sparse matrix of `k_aux` entries per token is faster than dense products with all dead latents."""
    if device.type == "cuda":
        return available(device) and n_dead > MIN_DEAD_ON_GPU * k_aux
    return device.type == "cpu" and has_kernels(device) and n_dead > MIN_DEAD * k_aux


def dead_reconstruction(
    x: Float[Tensor, "tokens d_in"],
    weights: Weights,
    dead: Int[Tensor, " n_dead"],
    hidden_pre: Float[Tensor, "n_dead tokens"] | None,
    k_aux: int,
) -> Float[Tensor, "tokens d_out"]:
    """Reconstruction from each token's `k_aux` largest pre-activations of dead latents, with gradient.

    As in SAELens, these need not be positive, and the decoder bias is not added. `weights` covers all latents,
    `hidden_pre` only the dead ones; None if the scan did not return it.
    """
    if by_entries(len(dead), k_aux, x.device):
        return encode_and_decode(x, weights, dead_entries(x, weights, dead, hidden_pre, k_aux)).reconstructions[0]
    part = weights.of(dead)
    codes = x @ part.W_enc + part.b_enc
    if len(dead) > k_aux:
        order = codes if part.norms is None else codes * part.norms
        chosen = order.topk(k_aux, dim=1, sorted=False).indices
        codes = torch.zeros_like(codes).scatter(1, chosen, codes.gather(1, chosen))
    return codes @ part.W_dec


@torch.no_grad()
def dead_entries(
    x: Float[Tensor, "tokens d_in"],
    weights: Weights,
    dead: Int[Tensor, " n_dead"],
    hidden_pre: Float[Tensor, "n_dead tokens"] | None,
    k_aux: int,
) -> Entries:
    """Each token's `k_aux` largest pre-activations of dead latents; see `dead_reconstruction`."""
    if hidden_pre is not None:
        blocks = [hidden_pre.T.contiguous()]  # topk reads a token's values many times, which takes longer with strides
    else:  # possibly too large to store, so computed for some tokens at a time
        n_rows, part = chunk_length(len(dead), x.device, at_least=16), weights.of(dead)
        blocks = (part.hidden_pre(rows) for rows in x.split(n_rows))
    largest, chosen = zip(*(block.topk(k_aux, dim=1, sorted=False) for block in blocks), strict=True)
    tokens = torch.arange(len(x), device=x.device).repeat_interleave(k_aux)
    return Entries(torch.cat(largest).flatten(), tokens, dead[torch.cat(chosen)].flatten())
