"""How much of one dictionary recurs in another: mean max cosine similarity and its chance level."""

import functools
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKTrainingSAE
from sae_lens.saes.sae import SAE
from sae_lens.synthetic.evals import mean_correlation_coefficient
from scipy.integrate import trapezoid
from scipy.stats import beta
from tabulate import tabulate
from torch import Tensor

TILE = 4096
"""Rows of each dictionary that are compared at a time: 64 MiB of cosines in float32."""
MATCH_MAX_LATENTS = 8192
"""Larger dictionaries are not matched one to one by default."""


class MaxCosines(NamedTuple):
    """Largest cosine, and largest |cosine|, of each row of two dictionaries, `a` and `b`, with any row of the other."""

    a: Float[Tensor, " n_a"]
    a_absolute: Float[Tensor, " n_a"]
    b: Float[Tensor, " n_b"]
    b_absolute: Float[Tensor, " n_b"]


class OneWay(NamedTuple):
    """Similarity of one dictionary's rows to another dictionary."""

    mmcs: float
    """Mean over rows of the largest cosine (|cosine| if not `signed`) with a row of the other dictionary."""
    mmcs_absolute: float
    """Mean over rows of the largest |cosine|, in [0, 1]."""
    share_above_0_7: float
    """Share of rows whose largest cosine (|cosine| if not `signed`) is above 0.7."""
    share_above_0_9: float
    baseline: float
    """Expected `mmcs` if each row of the other dictionary were an independent random direction."""
    baseline_absolute: float


class Similarity(NamedTuple):
    """Two dictionaries compared."""

    forward: OneWay
    """Rows of the first, found in the second."""
    backward: OneWay
    """Rows of the second, found in the first."""
    matched: float | None
    """Mean |cosine| of the one-to-one matching that maximises it, in [0, 1]; None if there are too many rows."""

    def swapped(self) -> "Similarity":
        """The comparison with the dictionaries swapped."""
        return Similarity(self.backward, self.forward, self.matched)


@torch.no_grad()
def dictionary_similarity(
    a: Float[Tensor, "n_a d_in"],
    b: Float[Tensor, "n_b d_in"],
    match_max_latents: int = MATCH_MAX_LATENTS,
    signed: bool = True,
) -> Similarity:
    r"""Mean max cosine similarity (MMCS) of two dictionaries, both ways, with related measures.

    $\mathrm{MMCS}(A, B) = \frac{1}{|A|} \sum_{a \in A} \max_{b \in B} \cos(a, b)$, in [-1, 1]; 1 if every row of A is,
    up to a positive factor, a row of B. For seeds of one configuration it measures how reproducible latents are.

    It is not symmetric: a subset of B is found entirely in B, but not B in the subset. It is not one-to-one: one row
    may be the partner of many, so an A made of copies of one row of B scores 1; `matched`, the Hungarian-matched mean
    |cosine|, is its one-to-one counterpart. It ignores whether latents ever fire. It is high where it means little:
    among dense directions that all SAEs share. It grows with the number of rows of B, so compare it with `baseline`,
    not across widths.

    Args:
        a: rows to find, such as `W_dec` or `W_enc.T`; for live latents only, `a[live]`.
        b: rows to find them in.
        match_max_latents: `matched` is None if either has more rows: it takes cubic time and the full cosine matrix.
        signed: whether a row differs from its negative. If not, as for AbsTopK, `mmcs`, the shares and `baseline` are
            of |cosines| too.

    Raises:
        ValueError: if one is empty or has non-finite entries, or their widths differ or are below 2.

    Sources: Sharkey et al. 2022, "Taking features out of superposition with sparse autoencoders" (MMCS);
    arXiv 2505.20254 (matched mean of trained seeds); arXiv 2501.16615 (one-to-one matches of seeds, above 0.7).
    """
    cosines = max_cosines(a, b)
    matched = None
    if max(len(a), len(b)) <= match_max_latents:
        matched = mean_correlation_coefficient(*(_unit_rows(rows, torch.float32) for rows in (a, b)))
    return Similarity(
        _one_way(cosines.a if signed else cosines.a_absolute, cosines.a_absolute, *b.shape, signed=signed),
        _one_way(cosines.b if signed else cosines.b_absolute, cosines.b_absolute, *a.shape, signed=signed),
        matched,
    )


def are_signed(*saes: SAE[Any]) -> bool:
    """Whether latents of SAEs differ from their negatives: those of AbsTopK, which also fire negatively, do not."""
    return not any(isinstance(sae, (AbsTopKSAE, AbsTopKTrainingSAE)) for sae in saes)


@torch.no_grad()
def max_cosines(a: Float[Tensor, "n_a d_in"], b: Float[Tensor, "n_b d_in"]) -> MaxCosines:
    """The largest cosine and |cosine| of every row of `a` with rows of `b` and the reverse, in one pass over tiles.

    A row of zeros has cosine 0 with every row. Products are at least in float32. Beyond its results it needs the
    memory of one tile and its rows, whatever the number of rows.

    Raises:
        ValueError: if one is empty or has non-finite entries, or their widths differ.
    """
    if a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(
            f"dictionaries of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; "
            "each must have at least one row, and all rows the same length."
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    of_a = torch.full((2, len(a)), -torch.inf, dtype=dtype, device=a.device)
    of_b = torch.full((2, len(b)), -torch.inf, dtype=dtype, device=a.device)
    for i in range(0, len(a), TILE):
        rows = _unit_rows(a[i : i + TILE], dtype)
        for j in range(0, len(b), TILE):
            tile = rows @ _unit_rows(b[j : j + TILE], dtype).T
            _raise_to(of_a[:, i : i + TILE], tile, dim=1)
            _raise_to(of_b[:, j : j + TILE], tile, dim=0)
    if not (of_a.isfinite().all() and of_b.isfinite().all()):
        raise ValueError("a dictionary has non-finite entries: its SAE is broken, so leave it out.")
    return MaxCosines(*of_a.clamp(-1, 1), *of_b.clamp(-1, 1))


@functools.cache
def random_baseline(n: int, d_in: int, absolute: bool) -> float:
    r"""Expected largest cosine (or |cosine|) of a unit vector with `n` independent random ones in `d_in` dimensions.

    With F the distribution of one cosine, it is $l + \int_l^1 1 - F(t)^n dt$ from the lowest value l, -1 or 0:
    $(c + 1) / 2 \sim \mathrm{Beta}(\frac{d - 1}{2}, \frac{d - 1}{2})$, and
    $c^2 \sim \mathrm{Beta}(\frac{1}{2}, \frac{d - 1}{2})$. Grows with n, about as $\sqrt{2 \ln n / d}$.

    Raises:
        ValueError: if `n` is below 1 or `d_in` below 2.
    """
    if n < 1 or d_in < 2:
        raise ValueError(f"n={n}, d_in={d_in}: a baseline needs at least 1 direction in at least 2 dimensions.")
    lowest, half = (0, 0.5) if absolute else (-1, (d_in - 1) / 2)
    t = np.linspace(lowest, 1, 100_001)
    distribution = beta.cdf(t**2 if absolute else (t + 1) / 2, half, (d_in - 1) / 2)
    return lowest + float(trapezoid(1 - distribution**n, t))


def similarity_table(saes: Mapping[str, SAE[Any]]) -> str:
    """Markdown table of all ordered pairs of SAEs: how much of the first one's dictionary is found in the second's."""
    header = ["of", "in", "decoder", "encoder", "decoder, absolute", "> 0.7", "> 0.9", "matched", "random"]
    rows = []
    for (a, sae_a), (b, sae_b) in combinations(saes.items(), 2):
        signed = are_signed(sae_a, sae_b)
        decoder = dictionary_similarity(sae_a.W_dec, sae_b.W_dec, signed=signed)
        encoder = dictionary_similarity(sae_a.W_enc.T, sae_b.W_enc.T, signed=signed)
        for names, of_decoder, of_encoder in (
            ((a, b), decoder.forward, encoder.forward),
            ((b, a), decoder.backward, encoder.backward),
        ):
            shares = [of_decoder.share_above_0_7, of_decoder.share_above_0_9]
            means = [of_decoder.mmcs, of_encoder.mmcs, of_decoder.mmcs_absolute]
            rows.append([*names, *means, *shares, decoder.matched, of_decoder.baseline])
    return tabulate(rows, header, tablefmt="pipe", floatfmt=".3f", missingval="-")


def _unit_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.normalize(x.to(dtype), dim=1)


def _raise_to(best: Tensor, tile: Tensor, dim: int) -> None:
    """Raise `best`, the largest values and absolute values so far, in place to those of `tile` along `dim`."""
    low, high = torch.aminmax(tile, dim=dim)
    torch.maximum(best, torch.stack([high, torch.maximum(high, -low)]), out=best)


def _one_way(cosines: Tensor, absolute: Tensor, n_other: int, d_in: int, signed: bool) -> OneWay:
    return OneWay(
        mmcs=cosines.double().mean().item(),
        mmcs_absolute=absolute.double().mean().item(),
        share_above_0_7=(cosines > 0.7).double().mean().item(),
        share_above_0_9=(cosines > 0.9).double().mean().item(),
        baseline=random_baseline(n_other, d_in, absolute=not signed),
        baseline_absolute=random_baseline(n_other, d_in, absolute=True),
    )
