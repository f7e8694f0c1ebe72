"""Several ranks in one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from sae_lens_sampled.step.ranks import SeveralRanks


class Simulated(SeveralRanks):
    """Ranks that are threads of one process."""

    def __init__(self, rank, count, barrier, box):
        self.rank, self.count, self.barrier, self.box = rank, count, barrier, box

    def sum(self, x):
        return self._reduced(x, lambda stacked: stacked.sum(dim=0).to(x.dtype))

    def max(self, x):
        return self._reduced(x, lambda stacked: stacked.amax(dim=0))

    def min(self, x):
        return self._reduced(x, lambda stacked: stacked.amin(dim=0))

    def _reduced(self, x, function):
        self.box[self.rank] = x
        self.barrier.wait(timeout=60)
        result = function(torch.stack(list(self.box)))
        self.barrier.wait(timeout=60)
        return result


def on_ranks(function, arguments):
    """Call `function(argument, ranks)` on one rank per argument; returns their results or errors."""
    count = len(arguments)
    barrier, box = threading.Barrier(count), [None] * count

    def call(rank):
        try:
            return function(arguments[rank], Simulated(rank, count, barrier, box))
        except ValueError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))
