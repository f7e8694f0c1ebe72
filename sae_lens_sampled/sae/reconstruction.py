"""Reconstructions by an SAE or a transcoder; SAELens' `decode` leaves out a transcoder's skip connection."""

from typing import Any

from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import SAE
from torch import Tensor, nn


def add_skip(sae: SAE[Any], x: Tensor, reconstruction: Tensor) -> Tensor:
    """The reconstruction, shape (..., d_out), plus the output of the skip connection, if `sae` has one.

    Args:
        sae: an SAE or transcoder for training or inference.
        x: its inputs, shape (..., d_in).
        reconstruction: decoded from these inputs; it may have more leading dimensions.
    """
    W_skip = getattr(sae, "W_skip", None)
    return reconstruction if W_skip is None else reconstruction + nn.functional.linear(x.to(W_skip.dtype), W_skip)


def decode_inner_widths(sae: Any, x: Tensor, acts: Tensor) -> list[Tensor]:
    """Reconstructions from the inner widths, shape (tokens, d_out), by SAELens' Matryoshka code, which takes 2-D input.

    Args:
        sae: a training SAE, with or without levels.
        x: its inputs, shape (..., d_in).
        acts: their feature activations, shape (..., d_sae).
    """
    if not sae.cfg.inner_widths:
        return []
    levels = MatryoshkaBatchTopKTrainingSAE._iterable_decode(sae, acts.flatten(0, -2))
    return [add_skip(sae, x.reshape(-1, x.shape[-1]), decoded) for _, decoded in levels]


def encode_and_reconstruct(sae: SAE[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Feature activations, shape (..., d_sae), and the reconstruction with a transcoder's skip, shape (..., d_out)."""
    acts = sae.encode(x)
    reconstruction = add_skip(sae, x, sae.decode(acts))
    return acts.to_dense() if acts.is_sparse else acts, reconstruction  # TopK's in training may be sparse
