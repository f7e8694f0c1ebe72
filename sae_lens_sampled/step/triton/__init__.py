"""GPU kernels, each next to its definition in plain torch; the other modules here import triton, this one does not."""

import functools
import importlib
import os
from typing import Literal

import torch

interpreted = False
"""Whether CPU tensors use the kernels too, in Triton's interpreter; for tests. Needs TRITON_INTERPRET=1 in the
environment before triton is imported."""

Sums = Literal["none", "squares", "shares", "counts", "clipped"]
"""What a scan sums over tokens: nothing; squares; or squares and, for "shares", shares x of the peak and x log x, for
"counts", the number of positive activations, for "clipped", squares of activations clipped at the last cutoff."""
SUMS_OF_SCORE: dict[str, Sums] = {
    "l2_norm": "squares",
    "squared_l2": "squares",
    "uniform": "squares",
    "ridge_leverage": "squares",  # for the norms; the score itself comes from a few rows
    "entropy": "shares",
    "perplexity": "shares",
    "frequency": "counts",
    "winsorised": "clipped",
}
"""The sums that each score needs; registered scores have no kernel."""

MIN_CAPABILITY = (8, 0)
"""Lowest compute capability that Triton supports."""


def available(device: torch.device) -> bool:
    """Whether the kernels can run on `device`: an NVIDIA GPU of at least `MIN_CAPABILITY` or, if `interpreted`, a CPU.

    Both need triton.
    """
    if device.type == "cuda":
        return torch.version.hip is None and _imports() and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    return interpreted and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _imports()


@functools.cache
def _imports() -> bool:
    try:
        importlib.import_module("triton.language")
    except Exception:  # a triton built for another torch can fail with any error
        return False
    return True
