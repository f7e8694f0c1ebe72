r"""A bfloat16 scan that finds all entries that a float32 step may keep, and recomputes these in float32.

The scan only has to find the entries that *may* be kept; exact values matter for kept entries only. So the product is
computed in bfloat16, in a third of the time on a CPU with bfloat16 instructions; an entry is extracted unless it lies
below the bound by more than rounding can explain; and entries that decide the selection are recomputed in float32.

**Error of a scanned entry.** Let $s_{ij} = n_j (\hat z_{ij} + b_j)$ with the product $\hat z$ of rounded factors,
$v_{ij} = n_j (z_{ij} + b_j)$ as in a float32 step, and $P = \|x_i\| \|w_j\|$, which bounds $\sum_l |x_{il} w_{jl}|$
(Cauchy-Schwarz). bfloat16 has 8 significant bits, so the relative error of rounding to nearest is at most
$u = 2^{-8}$. $s_{ij}$ and $v_{ij}$ differ by at most $2^{-126}$ plus $n_j$ times the sum of

- $(2u + u^2) P$ for rounding both factors, where $2u + u^2 = 2^{-7} + 2^{-16}$;
- $4 d\, 2^{-23} P$ for the float32 sums of both, in any order, even if they truncate;
- $1.01 u P$ for storing $\hat z$ in bfloat16 before adding the bias. Under cancellation $\hat z$ is tiny, but it never
  exceeds 1.01 P;
- $2^{-21} (P + |b_j|)$ for adding the bias, multiplying by $n_j$, and adding $E$ to and subtracting it from $s$ below;
- $2^{-124} (\sqrt d (\|x_i\| + \|w_j\|) + d)$ for numbers below $2^{-126}$, which the processor may flush to 0.

So the error is at most $E_{ij} = \|x_i\| a_j + c_j$, with a slope and an offset per latent. The scan is the full one if
a norm, a pre-activation's bound $n_j P$ or a scaled bias $n_j |b_j|$ could exceed $2^{120}$, so nothing overflows.

**Why nothing is missed.** Entries with $s_{ij} > \mathrm{bound} - E_{ij}$ are extracted, among them every entry with
$v_{ij} > \mathrm{bound}$. Let L be the `n_keep`-th largest $s - E$ among them, with $u |s - n b|$ in place of E's term
for storing: at least `n_keep` entries have $v \ge L$, so an entry with $s + E < L$ is not kept. The others are
recomputed in float32, and dropped if at or below the bound, where the extraction is incomplete. If at least `n_keep`
are left, they include the `n_keep` largest of all entries; otherwise the bound has to be lowered, unless it is 0.

With a pool of all latents, the kept entries are thus those of a float32 step, up to the order of its sums: even two
float32 products may lead to different kept entries within 1e-6 of the cutoff. The scan is chosen by configuration,
sizes, processor and batch, not by timing, so a repeated run on the same machine is bit-identical.
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_sampled.step.chunks import chunk_length
from sae_lens_sampled.step.products import products_at
from sae_lens_sampled.step.ranks import ALONE, Ranks
from sae_lens_sampled.step.selection import PoolFields
from sae_lens_sampled.step.sparse_codes import Entries, Weights

Scan = Literal["auto", "full", "reduced"]

LARGEST_NORM = 2.0**120
"""Norms and products of norms up to this value cannot cause an overflow."""
NORM_ROWS = 64
"""Number of rows of a matrix whose squares are summed at a time."""
MIN_D_IN = 256
"""Smallest input width at which the product is a large enough part of the scan. This and `MIN_TOKENS` are from
processor times at initialisation on Gaussian inputs, where the margin extracts most (AMD EPYC with AVX512_BF16, one
thread): the step up to the backward pass takes the same time as with a float32 scan at width 128, 7 % less at 256,
13 % less at 512, 19 % less at 768."""
MIN_TOKENS = 1024
"""Smallest number of tokens at which rounding all weights in every step pays off: at width 768, the time is 12 % less
at 1,024 tokens and 10 % more at 512."""
MAX_MARGIN = 0.5
"""Ratio of a typical entry's error bound to the extraction's bound, above which "auto" scans in float32: the margin
would extract most entries."""


class ReducedProduct(NamedTuple):
    r"""Pre-activations by a bfloat16 product, and their error bound: $E_{ij} = \|x_i\| a_j + c_j$."""

    x: Float[Tensor, "tokens d_in"]
    weights: Weights
    x_norm: Float[Tensor, " tokens"]
    """Norms of the inputs, rounded up."""
    slope: Float[Tensor, " d_sae"]
    """a, per latent."""
    offset: Float[Tensor, " d_sae"]
    """c, per latent."""
    storage: Float[Tensor, " d_sae"]
    """The slope's term for storing the product; once an entry is scanned, its value gives a tighter term."""

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "latents tokens"]]]:
        """Pre-activations by chunk of latents, in float32, off by at most E; each chunk overwrites the last."""
        W_enc, b_enc, _, norms, _ = self.weights
        (n_tokens, d_in), d_sae = self.x.shape, len(b_enc)
        width = min(chunk_length(n_tokens, self.x.device), d_sae)
        rows, product = (self.x.new_empty(width, n, dtype=torch.bfloat16) for n in (d_in, n_tokens))
        chunk, x_t = self.x.new_empty(width, n_tokens), self.x.to(torch.bfloat16).T
        for start in range(0, d_sae, width):
            part = slice(start, min(start + width, d_sae))
            n = part.stop - start
            torch.mm(rows[:n].copy_(W_enc.T[part]), x_t, out=product[:n])
            hidden_pre = chunk[:n].copy_(product[:n]).add_(b_enc[part, None])
            yield part, hidden_pre if norms is None else hidden_pre.mul_(norms[part, None])

    def may_exceed(
        self, bound: Float[Tensor, ""], hidden_pre: Float[Tensor, "latents tokens"], part: slice, out: Tensor
    ) -> Bool[Tensor, "latents tokens"]:
        r"""Where a scanned entry of these latents is above the bound, or below it by less than E.

        $s + \|x_i\| a_j > \mathrm{bound} - c_j$, whose rounding the slope and the offset cover. Both are per latent:
        norms differ a hundredfold, so a chunk's largest would extract most entries. `out` is overwritten.
        """
        below = _rounded_down(bound.double() - self.offset[part])
        largest = torch.addr(hidden_pre, self.slope[part].float(), self.x_norm.float(), out=out)
        return largest.le_(below[:, None]).bool().logical_not_()

    def exact(
        self, entries: Entries, bound: Float[Tensor, ""], n_keep: int, ranks: Ranks = ALONE
    ) -> tuple[Entries, int]:
        """The extracted entries that may be kept and exceed the bound, with their float32 values.

        Also returns the number of values computed.

        Args:
            entries: where `may_exceed` is true, ordered by latent and then by token.
            bound: non-negative.
            n_keep: number of entries to keep over all ranks.
            ranks: the processes that share the batch, each with its own entries; all must call this.
        """
        scanned, tokens, latents = entries
        # In float32, whose rounding the slope and the offset cover.
        slope, bias = (self.slope - self.storage).float(), self.weights.b_enc
        bias = bias if self.weights.norms is None else bias * self.weights.norms
        error = self.x_norm.float()[tokens] * slope[latents] + self.offset.float()[latents]
        error += 2**-8 * (scanned - bias[latents]).abs()
        least, _ = ranks.cutoff((scanned - error).clamp(min=0), n_keep)
        entries = entries.at((scanned + error >= torch.maximum(least, bound)).nonzero()[:, 0])
        exact = entries._replace(values=self._values(entries))
        return exact.at((exact.values > bound).nonzero()[:, 0]), len(exact.values)

    def _values(self, entries: Entries) -> Float[Tensor, " entries"]:
        """Pre-activations in float32 at entries that ascend by latent."""
        W_enc, b_enc, _, norms, _ = self.weights
        products = products_at(W_enc.T.contiguous(), self.x, entries.latents, entries.tokens)
        values = products + b_enc[entries.latents]
        return values if norms is None else values * norms[entries.latents]


@torch.no_grad()
def reduced_product(
    x: Float[Tensor, "tokens d_in"], weights: Weights, bound: Float[Tensor, ""], scan: Scan, ranks: Ranks = ALONE
) -> ReducedProduct | None:
    """The product for a reduced scan, or None if the batch has to be scanned in float32. All ranks decide identically.

    It is None if `scan` is "full", if norms or biases are so large that something could overflow, or, for "auto", if
    the margin would extract most entries.
    """
    if scan == "full":
        # Another rank's processor may have the instructions that this one lacks; devices, however, are of one type.
        if x.device.type == "cpu":
            ranks.any(True)
        return None
    x_norm, w_norm = column_norms(x.T), column_norms(weights.W_enc)
    slope, offset, storage = error_of(w_norm, weights.b_enc, weights.norms, x.shape[1])
    factor = 1.0 if weights.norms is None else weights.norms.double()
    sizes = torch.stack(
        [x_norm.amax(), w_norm.amax(), x_norm.amax() * (factor * w_norm).amax(), (factor * weights.b_enc).abs().amax()]
    )
    too_large = not bool((sizes <= LARGEST_NORM).all())  # also for NaN
    too_wide = scan == "auto" and bool(x_norm.median() * slope.median() > MAX_MARGIN * bound)
    if ranks.any(too_large or too_wide):
        return None
    return ReducedProduct(x.contiguous(), weights, x_norm, slope, offset, storage)


def error_of(
    w_norm: Float[Tensor, " d_sae"], b_enc: Float[Tensor, " d_sae"], norms: Float[Tensor, " d_sae"] | None, d_in: int
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Slopes and offsets of the error bound, and the slopes' terms for storing; float64. See the module's docstring.

    Args:
        w_norm: norms of the encoder's columns, rounded up; float64.
        b_enc: the encoder's bias.
        norms: factors that rescale the pre-activations; None for 1.
        d_in: width of the inputs.
    """
    n = torch.ones_like(w_norm) if norms is None else norms.double()
    storage = 1.01 * 2**-8 * n * w_norm
    slope = n * ((2**-7 + 2**-16 + 4 * d_in * 2**-23 + 2**-21) * w_norm + 2**-124 * math.sqrt(d_in)) + storage
    offset = n * (2**-21 * b_enc.double().abs() + 2**-124 * (math.sqrt(d_in) * w_norm + d_in)) + 2**-126
    up = 1 + 2**-20  # slopes and offsets are used in float32 too
    return (up * slope).clamp(min=2**-126), up * offset, storage


def column_norms(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
    """Norms of the columns, float64, rounded up."""
    blocks = matrix.split(NORM_ROWS)
    squared = sum((block.square().sum(dim=0) for block in blocks), start=matrix.new_zeros(matrix.shape[1]))
    if not bool(squared.isfinite().all()):  # squares overflow long before norms do
        squared = sum(
            (block.double().square().sum(dim=0) for block in blocks), start=squared.new_zeros((), dtype=torch.float64)
        )
    # Covers rounding in the sums of float32 squares, and numbers below 2^-63, whose squares are subnormal.
    return squared.double().sqrt() * (1 + len(matrix) * 2**-23) + math.sqrt(len(matrix)) * 2**-62


def choose_scan(scan: Scan, cfg: PoolFields, n_tokens: int, W_enc: Float[Tensor, "d_in d_sae"]) -> Scan:
    """How to scan: "full" without this module, "reduced" in bfloat16, "auto" likewise unless its margin is too wide.

    Chosen by rule, not by timing, so that runs are reproducible. "auto" needs a pool of all latents, a processor with
    bfloat16 instructions (AVX512_BF16, AMX; without them torch's bfloat16 product is slower) and sizes that make it
    pay. Smaller pools would be scored by rounded activations, so they need an explicit "reduced". The scan is always
    "full" on any device but a CPU, under autocast, which rounds values anyway, and for weights that are not in float32.
    """
    device = W_enc.device
    if scan == "full" or W_enc.dtype != torch.float32 or torch.is_autocast_enabled(device.type):
        return "full"
    if scan == "reduced":
        return "reduced" if device.type == "cpu" else "full"
    pays = cfg.n_candidates == cfg.d_sae and len(W_enc) >= MIN_D_IN and n_tokens >= MIN_TOKENS
    return "auto" if pays and device.type == "cpu" and has_bfloat16_instructions() else "full"


@functools.cache
def has_bfloat16_instructions() -> bool:
    """Whether this processor has bfloat16 instructions, according to torch, and torch uses them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # public only in newer versions, under other names
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in names)


def _rounded_down(x: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The largest float32 numbers that do not exceed `x`."""
    nearest = x.float()
    return torch.where(nearest.double() > x, nearest.nextafter(nearest.new_full((), -torch.inf)), nearest)
