"""Codes that SAEBench is shown instead of an SAE's own, so that its assumptions hold: context managers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import sae_bench.sae_bench_utils.activation_collection as activation_collection
import torch


def sae_methods(sae: Any, encode: Callable[..., Any], decode: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replace `encode` and `decode`: core encodes the activations to reconstruct, but a transcoder encodes others."""
    return mock.patch.multiple(sae, encode=encode, decode=decode)


def unit_rows(sae: Any) -> AbstractContextManager[Any]:
    """Scale the codes as if decoder rows had unit norm, which SAEBench assumes: for SAEs that cannot be folded.

    L1 norms and absorption would depend on how the norm is divided between the codes and the rows.
    """
    norms = sae.W_dec.detach().norm(dim=-1)
    norms = norms.where(norms > 0, 1)
    if torch.allclose(norms, torch.ones_like(norms), atol=0.01):  # folded, up to the rounding of bfloat16
        return nullcontext()
    return _codes_shown(sae, lambda codes: codes * norms)


def magnitudes(sae: Any) -> AbstractContextManager[Any]:
    """Encode to magnitudes, and decode with the signs: core takes latents with negative activations as inactive.

    Such activations, of AbsTopK SAEs, would be missing from densities, and so from the share of live latents, and
    would cancel in the L1 norm.
    """
    return _codes_shown(sae, lambda codes: codes.abs() if codes.amin() < 0 else codes)


@contextmanager
def _codes_shown(sae: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Encode to changed codes, and decode the unchanged ones; only the latest codes can be decoded."""
    encode, decode = sae.encode, sae.decode
    codes = shown = torch.empty(0)

    def encoded(x: torch.Tensor) -> torch.Tensor:
        nonlocal codes, shown
        codes = encode(x)
        shown = change(codes)
        return shown

    def decoded(acts: torch.Tensor) -> torch.Tensor:
        if acts is not shown:
            raise RuntimeError("only the latest codes of an SAE can be decoded while they are shown differently.")
        return decode(codes)

    with sae_methods(sae, encoded, decoded):
        yield


@contextmanager
def masked_tokens_only(sae: Any) -> Iterator[None]:
    """Leave out the tokens that sparse probing masks, and only these, when it averages over a text.

    SAEBench sets their activations to 0, and finds them again by sums that are 0, which outputs of a LayerNorm may
    have too. An SAE that divides by the norm encodes them to NaN, which stays NaN when it is multiplied by 0.
    """
    encode, einops = sae.encode, activation_collection.einops

    def encoded(x: torch.Tensor) -> torch.Tensor:
        acts = encode(x)
        acts[(x == 0).all(dim=-1)] = 0
        return acts

    def reduced(tensor: torch.Tensor, pattern: str, reduction: str) -> torch.Tensor:
        return (tensor != 0).any(dim=-1) if pattern == "B L D -> B L" else einops.reduce(tensor, pattern, reduction)

    replaced = SimpleNamespace(**{**vars(einops), "reduce": reduced})
    with sae_methods(sae, encoded, sae.decode), mock.patch.object(activation_collection, "einops", replaced):
        yield
