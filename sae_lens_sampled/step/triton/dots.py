"""Dot products of rows of two matrices: the gradient of the codes' values."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_sampled.step.triton.launch import block, launch, n_blocks, offset

BLOCK_ENTRIES = 16
BLOCK_WIDTH = 128


def plain_dots(
    rows: Int[Tensor, " entries"],
    other_rows: Int[Tensor, " entries"],
    matrix: Float[Tensor, "rows width"],
    other: Float[Tensor, "others width"],
) -> Float[Tensor, " entries"]:
    """The definition of `dots`."""
    return (matrix[rows].float() * other[other_rows].float()).sum(dim=1)


def dots(
    rows: Int[Tensor, " entries"],
    other_rows: Int[Tensor, " entries"],
    matrix: Float[Tensor, "rows width"],
    other: Float[Tensor, "others width"],
) -> Float[Tensor, " entries"]:
    """Dot products of a row of `matrix` and a row of `other` for each entry, in float32 whatever their dtypes."""
    n_entries, width = len(rows), matrix.shape[1]
    products = torch.empty(n_entries, device=matrix.device)
    grid = (n_blocks(n_entries, BLOCK_ENTRIES),)
    where = (rows.contiguous(), other_rows.contiguous())
    block_width = block(width, 16, BLOCK_WIDTH)
    launch(
        _dot_kernel, grid, matrix.device, *where, matrix.contiguous(), other.contiguous(), products, n_entries, width,
        BLOCK_ENTRIES, block_width,
    )  # fmt: skip
    return products


@triton.jit
@no_type_check
def _dot_kernel(rows, other_rows, matrix, other, products, n_entries, width, BE: tl.constexpr, BD: tl.constexpr):
    """One program per block of entries."""
    entries = offset(tl.program_id(0), tl.arange(0, BE), BE)
    inside = entries < n_entries
    row = tl.load(rows + entries, mask=inside, other=0)
    other_row = tl.load(other_rows + entries, mask=inside, other=0)
    total = tl.zeros((BE, BD), tl.float32)
    for first in range(0, width, BD):
        columns = first + tl.arange(0, BD)
        mask = inside[:, None] & (columns < width)[None, :]
        left = tl.load(matrix + offset(row[:, None], columns[None, :], width), mask=mask, other=0.0)
        right = tl.load(other + offset(other_row[:, None], columns[None, :], width), mask=mask, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(products + entries, tl.sum(total, axis=1), mask=inside)
