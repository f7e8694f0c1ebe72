"""Size of the chunks in which large matrices are computed: a chunk that stays in the cache is almost free to read."""

import torch

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Bytes of a chunk; other devices use the value of "cuda". On a CPU a chunk should fit into the cache: at 2048 tokens,
chunks of 256 to 1024 latents take the same time, chunks of 2048 latents a fifth more."""


def chunk_length(width: int, device: torch.device, at_least: int = 64) -> int:
    """Number of float32 vectors of length `width` that fit into a chunk, but not less than `at_least`."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(at_least, budget // (4 * max(width, 1)))
