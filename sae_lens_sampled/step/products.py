"""Products with a sparse matrix of a few entries per row, computed by torch's CSR products or by kernels.

Both torch's products (MKL on a CPU, cuSPARSE on CUDA) and the kernels need as many operations as the dense product,
times the density of the sparse matrix. All compute at least in float32: not all of these products exist in lower
precision.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_sampled.step.scores import in_float32
from sae_lens_sampled.step.triton import available


class Pattern:
    """Positions of a sparse matrix's entries, ascending by row; indices derived from them are cached."""

    def __init__(self, rows: Int[Tensor, " entries"], columns: Int[Tensor, " entries"], shape: tuple[int, int]) -> None:
        self.rows, self.columns, self.shape = rows, columns, shape
        self.sorted_columns, self.order = columns.int().sort(stable=True)  # half the passes of int64
        """The columns in ascending order, and the permutation that sorts the entries by column and then by row."""

    @functools.cached_property
    def rows_by_column(self) -> Int[Tensor, " entries"]:
        """Rows of the entries, sorted by column."""
        return self.rows.index_select(0, self.order)

    @functools.cached_property
    def row_starts(self) -> Int[Tensor, " rows_and_1"]:
        """Index of the first entry of every row, followed by the number of entries."""
        return _starts(self.rows, self.shape[0])

    @functools.cached_property
    def column_starts(self) -> Int[Tensor, " columns_and_1"]:
        """Index of the first entry of every column, among the entries sorted by column, and the number of entries."""
        return _starts(self.sorted_columns, self.shape[1])

    def csr(self, values: Float[Tensor, " entries"]) -> Tensor:
        """The sparse matrix with these values."""
        return _csr(values, self.row_starts, self.columns, self.shape)

    def transposed_csr(self, values: Float[Tensor, " entries"]) -> Tensor:
        """The transposed matrix, from values sorted by column."""
        return _csr(values, self.column_starts, self.rows_by_column, self.shape[::-1])


class Products(NamedTuple):
    """Products with a sparse matrix S, given by its pattern and values."""

    times: Callable[[Pattern, Tensor, Tensor], Tensor]
    """S W, from the pattern, values and W."""
    transposed_times: Callable[[Pattern, Tensor, Tensor], Tensor]
    """S^T X, from the pattern, values and X."""
    column_sums: Callable[[Pattern, Tensor], Tensor]
    """S^T 1, from the pattern and values."""
    at_entries: Callable[[Pattern, Tensor, Tensor], Tensor]
    """G W^T at the pattern's entries, from the pattern, G and W."""


def products_for(values: Tensor) -> Products:
    """The kernels if they can run on the device of `values`, else torch's products; for float64 always torch's."""
    return _by_kernels() if available(values.device) and values.dtype != torch.float64 else BY_CSR


def has_kernels(device: torch.device) -> bool:
    """Whether sparse products are available on `device`."""
    has_csr = device.type == "cuda" or (device.type == "cpu" and torch.backends.mkl.is_available())
    return has_csr or available(device)


@torch.no_grad()
def products_at(
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "columns d"],
    rows: Int[Tensor, " entries"],
    columns: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """$A B^T$ at the given entries, which ascend by row."""
    return _products_in(_csr(a.new_zeros(len(rows)), _starts(rows, len(a)), columns, (len(a), len(b))), a, b)


def _times(pattern: Pattern, values: Tensor, W: Tensor) -> Tensor:
    values = in_float32(values)
    return _product(pattern.csr(values), W.to(values.dtype))


def _transposed_times(pattern: Pattern, values: Tensor, X: Tensor) -> Tensor:
    values = in_float32(values)
    return _product(pattern.transposed_csr(values.index_select(0, pattern.order)), X.to(values.dtype))


def _column_sums(pattern: Pattern, values: Tensor) -> Tensor:
    values = in_float32(values)
    return values.new_zeros(pattern.shape[1]).index_add_(0, pattern.columns, values)


def _at_entries(pattern: Pattern, G: Tensor, W: Tensor) -> Tensor:
    G = in_float32(G)
    # Sorted by column, so that the row of W that a column needs stays in the cache.
    by_column = _products_in(pattern.transposed_csr(G.new_zeros(len(pattern.order))), W.to(G.dtype), G)
    return torch.empty_like(by_column).scatter_(0, pattern.order, by_column)


BY_CSR = Products(_times, _transposed_times, _column_sums, _at_entries)


@functools.cache
def _by_kernels() -> Products:
    from sae_lens_sampled.step.triton.dots import dots
    from sae_lens_sampled.step.triton.row_sums import row_sums

    def times(pattern: Pattern, values: Tensor, W: Tensor) -> Tensor:
        return row_sums(values, pattern.columns, pattern.row_starts, W)

    def transposed_times(pattern: Pattern, values: Tensor, X: Tensor) -> Tensor:
        return row_sums(values[pattern.order], pattern.rows_by_column, pattern.column_starts, X)

    def column_sums(pattern: Pattern, values: Tensor) -> Tensor:
        return transposed_times(pattern, values, torch.ones(pattern.shape[0], 1, device=values.device))[:, 0]

    def at_entries(pattern: Pattern, G: Tensor, W: Tensor) -> Tensor:
        return dots(pattern.rows, pattern.columns, G, W)

    return Products(times, transposed_times, column_sums, at_entries)


def _products_in(sparse: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """$A B^T$ at the entries of a sparse matrix of zeros."""
    return torch.sparse.sampled_addmm(sparse, a, b.T, beta=0).values()


def _product(sparse: Tensor, dense: Tensor) -> Tensor:
    """Same as `sparse @ dense`, but without its two extra passes over the result, which write zeros and copy them."""
    result = dense.new_empty(sparse.shape[0], dense.shape[1])
    return torch.addmm(result, sparse, dense, beta=0, out=result)


def _starts(ascending: Int[Tensor, " entries"], n: int) -> Int[Tensor, " n_and_1"]:
    return torch.searchsorted(ascending, torch.arange(n + 1, device=ascending.device))


def _csr(values: Tensor, row_starts: Tensor, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    _silence_first_warnings()
    return torch.sparse_csr_tensor(row_starts, columns, values, shape, check_invariants=False)


@functools.cache
def _silence_first_warnings() -> None:
    # When a process creates its first CSR tensor, as here, torch warns that CSR tensors are in beta. Torch 2.11 also
    # warns that invariants are not checked, whatever `check_invariants` is.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(beta state|invariant checks)", category=UserWarning)
        starts, empty = torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(starts, empty, torch.zeros(0), (1, 1), check_invariants=False)
