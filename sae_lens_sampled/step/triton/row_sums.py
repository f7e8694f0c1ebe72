"""Weighted sums of a matrix's rows: decoding (rows of W_dec per token) and weight gradients (tokens per latent)."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_sampled.step.triton.launch import block, launch, n_blocks, offset

PART_LENGTH = 256
"""Most entries that one program sums. A latent may fire on every token, so longer segments are summed in parts, and
the parts in order, so that repeated runs are bit-identical."""
BLOCK_ENTRIES = 8
BLOCK_WIDTH = 256


def plain_row_sums(
    values: Float[Tensor, " entries"],
    rows: Int[Tensor, " entries"],
    starts: Int[Tensor, " segments_and_1"],
    matrix: Float[Tensor, "rows width"],
) -> Float[Tensor, "segments width"]:
    """The definition of `row_sums`."""
    n_segments = len(starts) - 1
    segments = torch.repeat_interleave(torch.arange(n_segments, device=starts.device), starts.diff())
    sums = torch.zeros(n_segments, matrix.shape[1], device=matrix.device)
    return sums.index_add_(0, segments, values.float()[:, None] * matrix[rows].float())


def row_sums(
    values: Float[Tensor, " entries"],
    rows: Int[Tensor, " entries"],
    starts: Int[Tensor, " segments_and_1"],
    matrix: Float[Tensor, "rows width"],
) -> Float[Tensor, "segments width"]:
    """For each segment of entries, the sum of `values * matrix[rows]`, in float32; bit-identical from run to run.

    Args:
        values: weights of the rows.
        rows: the row of the matrix that each entry takes.
        starts: the start of each segment, where the one before ends, followed by the number of entries.
        matrix: of any floating-point dtype.
    """
    matrix, (n_segments, width) = matrix.contiguous(), (len(starts) - 1, matrix.shape[1])
    parts = parts_of(starts, len(values))
    sums_of_parts = torch.empty(len(parts.starts), width, device=matrix.device)
    sums = torch.empty(n_segments, width, device=matrix.device)
    block_width = block(width, 16, BLOCK_WIDTH)
    across = n_blocks(width, block_width)
    entries, blocks = (values.contiguous(), rows.contiguous()), (BLOCK_ENTRIES, block_width)
    device = matrix.device
    grid = (len(parts.starts), across)
    launch(_part_kernel, grid, device, *entries, parts.starts, parts.ends, matrix, sums_of_parts, width, *blocks)
    launch(
        _segment_kernel, (n_segments, across), device, *entries, starts, parts.numbers, matrix, sums_of_parts, sums,
        width, PART_LENGTH, *blocks,
    )  # fmt: skip
    return sums


class Parts(NamedTuple):
    """Parts of the long segments. Their number is known only on the device, so the last ones may be empty."""

    starts: Int[Tensor, " parts"]
    ends: Int[Tensor, " parts"]
    numbers: Int[Tensor, " segments_and_1"]
    """Index of each segment's first part; equal to the next segment's if the segment is summed as a whole."""


def parts_of(starts: Int[Tensor, " segments_and_1"], n_entries: int) -> Parts:
    """Split segments of more than `PART_LENGTH` entries into parts of at most that many."""
    lengths = starts.diff()
    n_parts = torch.where(lengths > PART_LENGTH, (lengths + PART_LENGTH - 1) // PART_LENGTH, 0)
    numbers = torch.cat([n_parts.new_zeros(1), n_parts.cumsum(dim=0)])
    # A segment of c > PART_LENGTH entries has fewer than 2 c / PART_LENGTH parts.
    part = torch.arange(2 * n_entries // PART_LENGTH, device=starts.device)
    segment = torch.searchsorted(numbers[1:], part, right=True).clamp(max=max(len(lengths) - 1, 0))
    first = starts[segment] + (part - numbers[segment]) * PART_LENGTH
    is_used = part < numbers[-1]
    ends = torch.minimum(first + PART_LENGTH, starts[segment + 1])
    return Parts(torch.where(is_used, first, 0), torch.where(is_used, ends, 0), numbers)


@triton.jit
@no_type_check
def _sum_of_rows(values, rows, start, end, matrix, columns, width, BE: tl.constexpr, BD: tl.constexpr):
    total = tl.zeros((BE, BD), tl.float32)
    for first in range(start, end, BE):
        entries = first + tl.arange(0, BE)
        inside = entries < end
        value = tl.load(values + entries, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(rows + entries, mask=inside, other=0)
        mask = inside[:, None] & (columns < width)[None, :]
        taken = tl.load(matrix + offset(row[:, None], columns[None, :], width), mask=mask, other=0.0)
        total += value[:, None] * taken.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
@no_type_check
def _part_kernel(values, rows, starts, ends, matrix, sums, width, BE: tl.constexpr, BD: tl.constexpr):
    """One program per part and block of columns."""
    part, columns = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    total = _sum_of_rows(values, rows, tl.load(starts + part), tl.load(ends + part), matrix, columns, width, BE, BD)
    tl.store(sums + offset(part, columns, width), total, mask=columns < width)


@triton.jit
@no_type_check
def _segment_kernel(
    values, rows, starts, part_numbers, matrix, sums_of_parts, sums, width,
    PART_LENGTH: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program per segment and block of columns: sums its entries, or its parts in order."""
    segment, columns = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    end = tl.where(end - start > PART_LENGTH, start, end)
    total = _sum_of_rows(values, rows, start, end, matrix, columns, width, BE, BD)
    for part in range(tl.load(part_numbers + segment), tl.load(part_numbers + segment + 1)):
        total += tl.load(sums_of_parts + offset(part, columns, width), mask=columns < width, other=0.0)
    tl.store(sums + offset(segment, columns, width), total, mask=columns < width)
