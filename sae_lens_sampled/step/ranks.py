"""Several processes that train one SAE: what they have to agree on, and how they do.

A rank is one of the processes; each has its own tokens of every batch, the next ones after those of the rank before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

T = TypeVar("T")


class Ranks:
    """The processes, as one of them sees them. This class is a process alone: nothing is exchanged, nothing changes.

    Every method but `n_of_all` and `own_rows` is one of all processes: whoever leaves one out hangs the rest.
    """

    rank = 0
    """Number of this process, from 0."""
    count = 1
    """Number of processes."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, equal to the last bit in all of them."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the processes."""
        return x

    def min(self, x: Tensor) -> Tensor:
        """Minimum over the processes."""
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the processes."""
        return x

    def total(self, n: int) -> int:
        """Sum of a whole number over the processes."""
        return n

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return flag

    def union(self, pool: Int[Tensor, "groups n_candidates"], d_sae: int) -> Int[Tensor, "groups n"]:  # noqa: ARG002
        """Indices of the latents that are in a pool of any process."""
        return pool

    def n_of_all(self, n_own: int) -> int:
        """What all have together, if each has `n_own`."""
        return n_own * self.count

    def own_rows(self, rows: Int[Tensor, " rows"], n_own: int) -> tuple[slice | Tensor, Int[Tensor, " own"]]:  # noqa: ARG002
        """Which of the batch's rows are this process's, if each has `n_own`, and their numbers among its own."""
        return slice(None), rows

    @torch.no_grad()
    def cutoff(self, values: Float[Tensor, " entries"], n_keep: int) -> tuple[Tensor, Int[Tensor, ""]]:
        """Cutoff of the `n_keep` largest values of all, and how many of those that equal it this process keeps.

        Args:
            values: this process's, not negative and not NaN.
            n_keep: of all processes together; where there are fewer values, all are kept.
        """
        n_keep = min(n_keep, len(values))
        cutoff = values.topk(n_keep, sorted=False).values.amin() if n_keep else values.new_full((), torch.inf)
        return cutoff, n_keep - (values > cutoff).sum()

    @torch.no_grad()
    def topk_indices(self, values: Float[Tensor, "..."], n_keep: int) -> Int[Tensor, " kept"]:
        """Which of this process's values are among the `n_keep` largest of all, as flat places; NaN is largest."""
        return values.flatten().topk(min(n_keep, values.numel()), sorted=False).indices.sort().values


ALONE = Ranks()


class SeveralRanks(Ranks):
    """More than one process; whoever derives from it says what they are and how they sum and compare tensors."""

    device = torch.device("cpu")
    """Where numbers have to lie to be exchanged."""

    @override
    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.count

    @override
    def total(self, n: int) -> int:
        return int(self.sum(torch.tensor(n, device=self.device)))

    @override
    def any(self, flag: bool) -> bool:
        return bool(self.max(torch.tensor(int(flag), device=self.device)))

    @override
    def union(self, pool: Int[Tensor, "groups n_candidates"], d_sae: int) -> Int[Tensor, "groups n"]:
        member = torch.zeros(d_sae, dtype=torch.int64, device=pool.device).index_fill_(0, pool.flatten(), 1)
        return self.max(member).nonzero().T

    @override
    def own_rows(self, rows: Int[Tensor, " rows"], n_own: int) -> tuple[slice | Tensor, Int[Tensor, " own"]]:
        own = rows.div(n_own, rounding_mode="floor") == self.rank
        return own, rows[own] % n_own

    @override
    @torch.no_grad()
    def cutoff(self, values: Float[Tensor, " entries"], n_keep: int) -> tuple[Tensor, Int[Tensor, ""]]:
        """As of one process; float32 or less precise.

        Exact: non-negative floats are ordered as their bits are, so three histograms of these, 11, 11 and 9 bits, find
        the cutoff. Among equals lower ranks come first, whose tokens do.
        """
        bits = values.float().clamp(min=0).view(torch.int32).long()
        remaining = torch.full((), n_keep, device=values.device)
        cutoff, inside = torch.zeros_like(remaining), torch.ones_like(bits, dtype=torch.bool)
        for shift, n_bits in ((20, 11), (9, 11), (0, 9)):
            digits = (bits >> shift) & (2**n_bits - 1)
            local = torch.zeros(2**n_bits, dtype=torch.int32, device=values.device)
            counts = self.sum(local.index_add_(0, digits, inside.int()))
            from_top = counts.flip(0).cumsum(0).flip(0)  # values whose digits are these or larger
            digit = ((from_top >= remaining).sum() - 1).clamp(min=0)  # 0 where there are too few
            remaining = remaining - (from_top[digit] - counts[digit])
            cutoff = cutoff | (digit << shift)
            inside = inside & (digits == digit)
        by_rank = torch.zeros(self.count, dtype=torch.int64, device=values.device)
        by_rank[self.rank] = inside.sum()
        by_rank = self.sum(by_rank)
        before = by_rank[: self.rank].sum()
        kept = (remaining - before).clamp(min=0).minimum(by_rank[self.rank])
        return cutoff.int().view(torch.float32), kept

    @override
    @torch.no_grad()
    def topk_indices(self, values: Float[Tensor, "..."], n_keep: int) -> Int[Tensor, " kept"]:
        flat = values.flatten().nan_to_num(nan=torch.inf)
        cutoff, n_equal = self.cutoff(flat, n_keep)
        above, equal = flat > cutoff, flat == cutoff
        return (above | (equal & (equal.cumsum(dim=0) <= n_equal))).nonzero()[:, 0]


class GroupRanks(SeveralRanks):
    """The processes of a group of `torch.distributed`."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        self.n_bytes = 0
        """Bytes that this process has handed to others so far."""

    @override
    def sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    @override
    def max(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    @override
    def min(self, x: Tensor) -> Tensor:
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
