"""Shared by all kernels: launching, offsets and block sizes."""

from contextlib import nullcontext
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl


@triton.jit
@no_type_check
def offset(row, column, width):
    """Flat index into a matrix of `width` columns; int64, as tokens x latents and latents x width may exceed 2^31."""
    return tl.cast(row, tl.int64) * width + column


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
    """Run `kernel` on `device`, which need not be the current one; does nothing if the grid is empty."""
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments)


def block(length: int, at_least: int, at_most: int) -> int:
    """The smallest power of 2 that is at least `length`, clamped to bounds that are powers of 2 too."""
    return min(max(1 << (length - 1).bit_length(), at_least), at_most)


def n_blocks(length: int, block_length: int) -> int:
    """Number of blocks that cover `length`."""
    return -(-length // block_length)
