"""Several processes that train one SAE: reductions and an exact selection over the tokens of all.

A rank is one of the processes. Each holds its own tokens of every batch, following those of the previous rank.
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
    """The processes, as seen from one of them. This class stands for a single process, which exchanges nothing.

    Every method except `n_of_all` and `own_rows` is a collective operation: a process that skips one hangs the others.
    """

    rank = 0
    """Index of this process, from 0."""
    count = 1
    """Number of processes."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, bit-identical on all of them."""
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
        """Sum of an integer over the processes."""
        return n

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag

    def union(self, pool: Int[Tensor, "groups n_candidates"], d_sae: int) -> Int[Tensor, "groups n"]:  # noqa: ARG002
        """Indices of the latents in any pool of any process; with one process, its pools as they are."""
        return pool

    def n_of_all(self, n_own: int) -> int:
        """Total over the processes, if each has `n_own`."""
        return n_own * self.count

    def own_rows(self, rows: Int[Tensor, " rows"], n_own: int) -> tuple[slice | Tensor, Int[Tensor, " own"]]:  # noqa: ARG002
        """Which of the batch's `rows` belong to this process, if each has `n_own`, and their indices among its own."""
        return slice(None), rows

    @torch.no_grad()
    def cutoff(self, values: Float[Tensor, " entries"], n_keep: int) -> tuple[Tensor, Int[Tensor, ""]]:
        """Cutoff of the `n_keep` largest values over all processes, and how many values equal to it this process keeps.

        Args:
            values: this process's values, non-negative and not NaN.
            n_keep: number of values to keep over all processes; if there are fewer, all are kept.
        """
        n_keep = min(n_keep, len(values))
        cutoff = values.topk(n_keep, sorted=False).values.amin() if n_keep else values.new_full((), torch.inf)
        return cutoff, n_keep - (values > cutoff).sum()

    @torch.no_grad()
    def topk_indices(self, values: Float[Tensor, "..."], n_keep: int) -> Int[Tensor, " kept"]:
        """Ascending flat indices of this process's values among the `n_keep` largest of all; NaN counts as largest."""
        return values.flatten().topk(min(n_keep, values.numel()), sorted=False).indices.sort().values


ALONE = Ranks()


class SeveralRanks(Ranks):
    """More than one process; subclasses define which processes, and how these sum and compare tensors."""

    device = torch.device("cpu")
    """Device that numbers have to be moved to before they are exchanged."""

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
        """Keeps what one process keeps; `values` in float32 or lower precision.

        Exact: non-negative floats are ordered like their bits, so three histograms, of 11, 11 and 9 bits, find the
        cutoff. Ties go to lower ranks, whose tokens come first. The cutoff is float32, and 0 if there are fewer
        than `n_keep` values.
        """
        bits = values.float().clamp(min=0).view(torch.int32).long()
        remaining = torch.full((), n_keep, device=values.device)
        cutoff, inside = torch.zeros_like(remaining), torch.ones_like(bits, dtype=torch.bool)
        for shift, n_bits in ((20, 11), (9, 11), (0, 9)):
            digits = (bits >> shift) & (2**n_bits - 1)
            local = torch.zeros(2**n_bits, dtype=torch.int32, device=values.device)
            counts = self.sum(local.index_add_(0, digits, inside.int()))
            from_top = counts.flip(0).cumsum(0).flip(0)  # number of values with this digit or a larger one
            digit = ((from_top >= remaining).sum() - 1).clamp(min=0)  # 0 if there are too few values
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
    """The processes of a `torch.distributed` group."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        self.n_bytes = 0
        """Bytes that this process has passed to reductions so far."""

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
        """Overwrite `x`, which must be contiguous, with rank 0's: memory is sent as it lies."""
        root = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        with _reporting_lost_ranks(self):
            dist.broadcast(x, root, group=self.group)

    def gather(self, x: T) -> list[T]:
        """The objects that all processes passed, in order of rank; anything that can be pickled."""
        everyone: list[Any] = [None] * self.count
        with _reporting_lost_ranks(self):
            dist.all_gather_object(everyone, x, group=self.group)
        return everyone

    def _reduced(self, x: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        x = x.to(torch.uint8).contiguous() if x.dtype == torch.bool else x.contiguous().clone()
        self.n_bytes += x.numel() * x.element_size()
        with _reporting_lost_ranks(self):
            dist.all_reduce(x, operation, group=self.group)
        return x


class LostRankError(ConnectionError):
    """An exchange with the other processes failed, most likely since one has ended or has not responded in time."""


@contextmanager
def _reporting_lost_ranks(ranks: GroupRanks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"process {ranks.rank} of {ranks.count} lost contact with the others: most likely one has ended or "
            f"hangs (see their logs). Resume from the newest checkpoint, if any; progress since then is lost. ({error})"
        ) from error
