"""Several processes that train one SAE: what they have to agree on, and how they do.

A rank is one of the processes; each has its own tokens of every batch, the next ones after those of the rank before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

T = TypeVar("T")


@runtime_checkable
class Ranks(Protocol):
    """The processes, as one of them sees them. Every operation is one of all: whoever leaves one out hangs the rest."""

    rank: int
    """Number of this process, from 0."""
    count: int
    """Number of processes."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, equal to the last bit in all of them."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the processes."""
        ...

    def min(self, x: Tensor) -> Tensor:
        """Minimum over the processes."""
        ...


class Alone:
    """One process: nothing is exchanged, and nothing changes."""

    rank, count = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        """`x` as it is."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """`x` as it is."""
        return x

    def min(self, x: Tensor) -> Tensor:
        """`x` as it is."""
        return x


ALONE = Alone()


class GroupRanks:
    """The processes of a group of `torch.distributed`."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.n_bytes = 0
        """Bytes that this process has handed to others so far."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the processes."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def min(self, x: Tensor) -> Tensor:
        """Minimum over the processes."""
        return self._reduced(x, dist.ReduceOp.MIN)

    def broadcast(self, x: Tensor) -> None:
        """Overwrite `x` with what rank 0 has."""
        root = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        with _lost_ranks_told(self):
            dist.broadcast(x, root, group=self.group)

    def gather(self, x: T) -> list[T]:
        """What each process has handed over: anything that can be pickled."""
        everyone: list[Any] = [None] * self.count
        with _lost_ranks_told(self):
            dist.all_gather_object(everyone, x, group=self.group)
        return everyone

    def _reduced(self, x: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        x = x.to(torch.uint8).contiguous() if x.dtype == torch.bool else x.contiguous().clone()
        self.n_bytes += x.numel() * x.element_size()
        with _lost_ranks_told(self):
            dist.all_reduce(x, operation, group=self.group)
        return x


class LostRankError(ConnectionError):
    """Another process has ended, or has not answered in time."""


@contextmanager
def _lost_ranks_told(ranks: GroupRanks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"process {ranks.rank} of {ranks.count} has waited for the others in vain: one has ended or hangs, and has "
            f"said why if it could. Nothing is saved of what came after the newest checkpoint. ({error})"
        ) from error


@torch.no_grad()
def keep_of_all(values: Float[Tensor, " entries"], n_keep: int, ranks: Ranks) -> tuple[Tensor, Int[Tensor, ""]]:
    """Cutoff of the `n_keep` largest values of all ranks, and how many of those that equal it this rank keeps.

    Exact: non-negative floats are ordered as their bits are, so three histograms of these, 11, 11 and 9 bits, find the
    cutoff. Among equals lower ranks come first, whose tokens do.

    Args:
        values: this rank's, not negative and not NaN; float32 or less precise.
        n_keep: of all ranks together; where there are fewer values, all are kept.
        ranks: the processes.
    """
    bits = values.float().clamp(min=0).view(torch.int32).long()
    remaining = torch.full((), n_keep, device=values.device)
    cutoff, inside = torch.zeros_like(remaining), torch.ones_like(bits, dtype=torch.bool)
    for shift, n_bits in ((20, 11), (9, 11), (0, 9)):
        digits = (bits >> shift) & (2**n_bits - 1)
        local = torch.zeros(2**n_bits, dtype=torch.int32, device=values.device)
        counts = ranks.sum(local.index_add_(0, digits, inside.int()))
        from_top = counts.flip(0).cumsum(0).flip(0)  # values whose digits are these or larger
        digit = ((from_top >= remaining).sum() - 1).clamp(min=0)  # 0 where there are too few
        remaining = remaining - (from_top[digit] - counts[digit])
        cutoff = cutoff | (digit << shift)
        inside = inside & (digits == digit)
    by_rank = torch.zeros(ranks.count, dtype=torch.int64, device=values.device)
    by_rank[ranks.rank] = inside.sum()
    by_rank = ranks.sum(by_rank)
    before = by_rank[: ranks.rank].sum()
    kept = (remaining - before).clamp(min=0).minimum(by_rank[ranks.rank])
    return cutoff.int().view(torch.float32), kept


@torch.no_grad()
def largest_of_ranks(values: Float[Tensor, "..."], n_keep: int, ranks: Ranks) -> Tensor:
    """Which of this rank's values are among the `n_keep` largest of all ranks, in their shape; NaN is the largest."""
    flat = values.flatten().nan_to_num(nan=torch.inf)
    cutoff, n_equal = keep_of_all(flat, n_keep, ranks)
    above, equal = flat > cutoff, flat == cutoff
    return (above | (equal & (equal.cumsum(dim=0) <= n_equal))).view_as(values)
