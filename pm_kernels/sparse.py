"""Static mixing matrices with structure: few nonzeros in a row, or few blocks that hold any."""

from typing import NamedTuple

import torch
from torch import Tensor

LISTED, CHUNK = 64, 32  # rows and columns of a block


class ByColumn(NamedTuple):
    """The entries of a :class:`SparseRows` (M, N) in order of their columns.

    Args:
        starts: (N,), where each column's entries start.
        rows: (nonzeros,), the row of each entry.
        entries: (nonzeros,), where the entry stands in the order of rows.
    """

    starts: Tensor
    rows: Tensor
    entries: Tensor

    @classmethod
    def of(cls, starts: Tensor, columns: Tensor, tokens: int) -> "ByColumn":
        """That of a matrix with ``tokens`` columns, in its integer type."""
        ordered, entries = torch.sort(columns, stable=True)
        rows = torch.searchsorted(starts, entries.to(starts.dtype), right=True) - 1
        found = torch.searchsorted(ordered, torch.arange(tokens, device=columns.device, dtype=columns.dtype))
        return cls(*(indices.to(columns.dtype) for indices in (found, rows, entries)))


class SparseRows(NamedTuple):
    """A matrix (M, N) by its nonzeros, row after row, as :func:`pm_kernels.token_mix` takes it.

    Args:
        starts: (M,) int32 or int64, nondecreasing from 0: where each row's entries start; a row may be empty.
        columns: (nonzeros,) of the same integer type: the column of each entry. A column may occur twice in a row;
            its values are added.
        values: (nonzeros,) floating point, differentiable.
        by_column: the same entries in order of columns, which a backward on the kernels would work out at every call.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    by_column: ByColumn | None = None

    @classmethod
    def from_dense(cls, matrix: Tensor) -> "SparseRows":
        """The nonzeros of a matrix (M, N), ready for a backward."""
        rows, columns = matrix.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(matrix), device=matrix.device)).int()
        by_column = ByColumn.of(starts, columns.int(), matrix.shape[1])
        return cls(starts, columns.int(), matrix[rows, columns], by_column)

    def to_dense(self, columns: int) -> Tensor:
        """The matrix (M, ``columns``), differentiable in the values."""
        entries = torch.arange(len(self.columns), device=self.columns.device, dtype=self.starts.dtype)
        rows = torch.searchsorted(self.starts, entries, right=True) - 1
        dense = self.values.new_zeros(len(self.starts), columns)
        return dense.index_put((rows, self.columns.long()), self.values, accumulate=True)

    def to(self, dtype: torch.dtype) -> "SparseRows":
        """The same matrix with values of another dtype."""
        return self._replace(values=self.values.to(dtype))


class BlockRows(NamedTuple):
    """A matrix (M, N) and which of its blocks of 64 x 32 hold nonzeros, as :func:`pm_kernels.token_mix` takes it.

    The kernels leave out the other blocks of a product; PyTorch multiplies by all of them.

    Args:
        matrix: (M, N), differentiable in every entry, whatever its block.
        starts: (ceil(M / 64) + 1,) int32: where the list of each 64 rows starts, and where the last one ends.
        chunks: (blocks,) int32: which 32 columns each block of the lists has, counted from 0.
    """

    matrix: Tensor
    starts: Tensor
    chunks: Tensor

    @classmethod
    def from_dense(cls, matrix: Tensor) -> "BlockRows":
        """The blocks of a matrix that are not all zero."""
        rows, columns = matrix.shape
        padded = torch.nn.functional.pad(matrix != 0, (0, -columns % CHUNK, 0, -rows % LISTED))
        held = padded.view(-(-rows // LISTED), LISTED, -(-columns // CHUNK), CHUNK).any(3).any(1)
        starts = torch.nn.functional.pad(held.sum(1).cumsum(0), (1, 0)).int()
        return cls(matrix, starts, held.nonzero(as_tuple=True)[1].int())

    def to(self, dtype: torch.dtype) -> "BlockRows":
        """The same with a matrix of another dtype."""
        return self._replace(matrix=self.matrix.to(dtype))


Matrix = Tensor | SparseRows | BlockRows
