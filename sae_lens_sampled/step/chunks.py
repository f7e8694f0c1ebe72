"""How much of a large matrix is held at a time: what stays in the cache costs hardly anything to look at."""

import torch

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Size of a chunk; other devices as "cuda". On a CPU what stays in the cache: at 2048 tokens chunks of 256 to 1024
latents take the same time, 2048 a fifth more."""


def chunk_length(width: int, device: torch.device, at_least: int = 64) -> int:
    """Number of float32 vectors of length `width` that make a chunk."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(at_least, budget // (4 * max(width, 1)))
