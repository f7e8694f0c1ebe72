r"""A scan in bfloat16 that finds every entry that a float32 step may keep, and float32 values of those.

The scan has to find what *may* be kept; values are needed of the kept entries alone. So the product is taken in
bfloat16, at a third of the time on a CPU that has such products; an entry is extracted unless it lies below the bound
by more than rounding can account for; and those that decide are computed once more, in float32.

**How far a scanned entry may be off.** Let $s_{ij} = n_j (\hat z_{ij} + b_j)$ with the product $\hat z$ of rounded
factors, $v_{ij} = n_j (z_{ij} + b_j)$ as a float32 step has it, and $P = \|x_i\| \|w_j\|$, which bounds $\sum_l
|x_{il} w_{jl}|$ (Cauchy-Schwarz). bfloat16 has 8 significant bits, so rounding to nearest changes a number by at most
its $u = 2^{-8}$-th part. In units of $n_j$ the two differ by at most

- $(2u + u^2) P$ for rounding both factors, $2^{-7} + 2^{-16}$;
- $4 d\, 2^{-23} P$ for the float32 sums of both, in any order, truncating ones included;
- $1.01 u P$ for storing $\hat z$ in bfloat16 before the bias. Under cancellation $\hat z$ is tiny, but never above
  1.01 P;
- $2^{-21} (P + |b_j|)$ for adding the bias, for the factor $n_j$ and for what is added to and taken from $s$ here;
- $2^{-124} (\sqrt d (\|x_i\| + \|w_j\|) + d)$ for numbers below $2^{-126}$, which the processor may take for 0;

and $2^{-126}$ besides. So the error is at most $E_{ij} = \|x_i\| a_j + c_j$, with a slope and an offset per latent.
Nothing overflows as long as no norm exceeds $2^{120}$; where one does, the scan is the full one, and nowhere else.

**Why nothing is missed.** Entries with $s_{ij} > \mathrm{bound} - E_{ij}$ are extracted: so is every entry with
$v_{ij} > \mathrm{bound}$. Let L be the `n_keep`-th largest $s - E$ among them, with $u |s - n b|$ in place of what E
has for storing: at least `n_keep` entries have $v \ge L$, so an entry with $s + E < L$ is not kept. The rest are
computed in float32, and those at or below the bound dropped, for which the extraction is not complete. If at least
`n_keep` are left, the `n_keep` largest of all entries are among them; otherwise the bound has to be lowered.

What is kept is thus what a float32 step keeps, up to the order of its sums: two float32 products differ in entries
within 1e-6 of the cutoff too. The choice of the scan goes by configuration, sizes, processor and batch, not by a
clock: the same machine repeats a run to the last bit.
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
"""Norms, and products of them, up to which nothing overflows."""
NORM_ROWS = 64
"""Rows of a matrix whose squares are summed at a time."""
MIN_D_IN = 256
"""Width of the inputs from which the product is a large enough part of the scan. This and the next one are by processor
time at initialisation on Gaussian inputs, where the margin extracts most (AMD EPYC with AVX512_BF16, one thread): what
is before the backward pass takes as long at width 128, 7 % less at 256, 13 % less at 512, 19 % less at 768."""
MIN_TOKENS = 1024
"""Tokens from which it does not matter that all weights are rounded in every step: at width 768 12 % less at 1,024,
10 % more at 512."""
MAX_MARGIN = 0.5
"""Error bound of a typical entry over the bound of the extraction, from which on `auto` scans in float32: the margin
would extract most entries."""


class ReducedProduct(NamedTuple):
    r"""Pre-activations in bfloat16, and how far they may be off: $E_{ij} = \|x_i\| a_j + c_j$."""

    x: Float[Tensor, "tokens d_in"]
    weights: Weights
    x_norm: Float[Tensor, " tokens"]
    """Norms of the inputs, rounded up."""
    slope: Float[Tensor, " d_sae"]
    """a, per latent."""
    offset: Float[Tensor, " d_sae"]
    """c, per latent."""
    storage: Float[Tensor, " d_sae"]
    """What of the slope stands for storing the product, of which a given value tells more."""
    scratch: Float[Tensor, "width tokens"]
    """As large as a chunk: memory that is written for the first time costs as much as the product."""

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "latents tokens"]]]:
        """Pre-activations of some latents in float32, off by E at most; a chunk is overwritten by the next one."""
        W_enc, b_enc, _, norms, _ = self.weights
        (n_tokens, d_in), d_sae = self.x.shape, len(b_enc)
        width = len(self.scratch)
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
        r"""Where a scanned entry of these latents is above the bound, or below it by no more than E.

        $s + \|x_i\| a_j > \mathrm{bound} - c_j$, whose rounding is in the slope and the offset. Norms of latents differ
        a hundredfold: with a chunk's largest, most entries would be extracted. `out` is memory to write over.
        """
        below = _rounded_down(bound.double() - self.offset[part])
        largest = torch.addr(hidden_pre, self.slope[part].float(), self.x_norm.float(), out=out)
        return largest.le_(below[:, None]).bool().logical_not_()

    def exact(
        self, entries: Entries, bound: Float[Tensor, ""], n_keep: int, ranks: Ranks = ALONE
    ) -> tuple[Entries, int]:
        """Those of the extracted entries that can be kept and exceed the bound, with their float32 values.

        Also how many values were computed.

        Args:
            entries: where `may_exceed` is true, ascending by latent and then by token.
            bound: not negative.
            n_keep: entries to keep, of all ranks together.
            ranks: the processes that share the batch, each with its own entries; all call this.
        """
        scanned, tokens, latents = entries
        # In float32, whose rounding is in the slope and the offset.
        slope, bias = (self.slope - self.storage).float(), self.weights.b_enc
        bias = bias if self.weights.norms is None else bias * self.weights.norms
        error = self.x_norm.float()[tokens] * slope[latents] + self.offset.float()[latents]
        error += 2**-8 * (scanned - bias[latents]).abs()
        least, _ = ranks.cutoff((scanned - error).clamp(min=0), n_keep)
        entries = entries.at((scanned + error >= torch.maximum(least, bound)).nonzero()[:, 0])
        exact = entries._replace(values=self._values(entries))
        return exact.at((exact.values > bound).nonzero()[:, 0]), len(exact.values)

    def _values(self, entries: Entries) -> Float[Tensor, " entries"]:
        """Pre-activations at entries, ascending by latent, in float32."""
        W_enc, b_enc, _, norms, _ = self.weights
        products = products_at(W_enc.T.contiguous(), self.x, entries.latents, entries.tokens)
        values = products + b_enc[entries.latents]
        return values if norms is None else values * norms[entries.latents]


@torch.no_grad()
def reduced_product(
    x: Float[Tensor, "tokens d_in"], weights: Weights, bound: Float[Tensor, ""], scan: Scan, ranks: Ranks = ALONE
) -> ReducedProduct | None:
    """What the reduced scan goes by; None where a batch has to be scanned in float32. All ranks decide alike.

    That is where norms could overflow and, unless the scan has to be "reduced", where the margin would extract most
    entries.
    """
    if scan == "full":
        return None
    x_norm, w_norm = column_norms(x.T), column_norms(weights.W_enc)
    slope, offset, storage = error_of(w_norm, weights.b_enc, weights.norms, x.shape[1])
    factor = 1.0 if weights.norms is None else weights.norms.double()
    sizes = torch.stack(
        [x_norm.amax(), w_norm.amax(), x_norm.amax() * (factor * w_norm).amax(), (factor * weights.b_enc).abs().amax()]
    )
    too_large = not bool((sizes <= LARGEST_NORM).all())  # NaN is not below
    too_wide = scan == "auto" and bool(x_norm.median() * slope.median() > MAX_MARGIN * bound)
    if ranks.any(too_large or too_wide):
        return None
    scratch = x.new_empty(min(chunk_length(len(x), x.device), len(slope)), len(x))
    return ReducedProduct(x.contiguous(), weights, x_norm, slope, offset, storage, scratch)


def error_of(
    w_norm: Float[Tensor, " d_sae"], b_enc: Float[Tensor, " d_sae"], norms: Float[Tensor, " d_sae"] | None, d_in: int
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Slopes and offsets of the error bound, and the part of slopes for storing; float64. See the module's docstring.

    Args:
        w_norm: norms of the encoder's columns, rounded up; float64.
        b_enc: the encoder's bias.
        norms: factors of the pre-activations; None for 1.
        d_in: width of the inputs.
    """
    n = torch.ones_like(w_norm) if norms is None else norms.double()
    storage = 1.01 * 2**-8 * n * w_norm
    slope = n * ((2**-7 + 2**-16 + 4 * d_in * 2**-23 + 2**-21) * w_norm + 2**-124 * math.sqrt(d_in)) + storage
    offset = n * (2**-21 * b_enc.double().abs() + 2**-124 * (math.sqrt(d_in) * w_norm + d_in)) + 2**-126
    up = 1 + 2**-20  # they are taken in float32 too
    return (up * slope).clamp(min=2**-126), up * offset, storage


def column_norms(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
    """Norms of the columns, float64, rounded up."""
    blocks = matrix.split(NORM_ROWS)
    squared = sum((block.square().sum(dim=0) for block in blocks), start=matrix.new_zeros(matrix.shape[1]))
    if not bool(squared.isfinite().all()):  # squares overflow long before norms do
        squared = sum(
            (block.double().square().sum(dim=0) for block in blocks), start=squared.new_zeros((), dtype=torch.float64)
        )
    # Sums of float32 squares, and what is lost of numbers below 2^-63, whose squares are no normal numbers.
    return squared.double().sqrt() * (1 + len(matrix) * 2**-23) + math.sqrt(len(matrix)) * 2**-62


def choose_scan(scan: Scan, cfg: PoolFields, n_tokens: int, W_enc: Float[Tensor, "d_in d_sae"]) -> Scan:
    """How to scan: "full" in float32, "reduced" in bfloat16, "auto" for the latter unless its margin is too wide.

    By rule, not by a clock: so runs repeat. "auto" is for a pool of all latents, where the processor has instructions
    for bfloat16 (AVX512_BF16, AMX; without them torch's product in it is slower) and the sizes make it pay. Scores of
    pools would be of rounded activations, so there it has to be asked for. Never under autocast, which rounds the
    values too, and for parameters in float32 alone.
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
    """Whether this processor multiplies bfloat16 numbers, by what torch says of it, and torch uses that."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # public only in newer versions, by other names
    return torch.backends.mkldnn.is_available() and any(getattr(torch.cpu, name, bool)() for name in names)


def _rounded_down(x: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The largest float32 numbers that are not above `x`."""
    nearest = x.float()
    return torch.where(nearest.double() > x, nearest.nextafter(nearest.new_full((), -torch.inf)), nearest)
