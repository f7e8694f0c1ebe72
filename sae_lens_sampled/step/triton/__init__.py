"""Kernels for GPUs, each beside its definition in plain torch; the modules here import triton, this one does not."""

import functools
import importlib
import os
from typing import Literal

import torch

interpreted = False
"""Whether tensors on a CPU take the kernels too, under Triton's interpreter; for tests. It needs TRITON_INTERPRET=1 in
the environment before triton is imported."""

Sums = Literal["none", "squares", "shares", "counts", "clipped"]
"""What a scan sums over tokens: squares alone; also shares of the peak and their x log x; or positive ones; or squares
of what is clipped at the last cutoff."""
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
"""What a scan sums for a score; registered scores have no kernel."""

MIN_CAPABILITY = (8, 0)
"""Oldest GPUs for which Triton is made."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: NVIDIA's GPUs where triton is installed."""
    if device.type == "cuda":
        return torch.version.hip is None and _imports() and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    return interpreted and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _imports()


@functools.cache
def _imports() -> bool:
    try:
        importlib.import_module("triton.language")
    except Exception:  # an installation for another torch fails in ways of its own
        return False
    return True
