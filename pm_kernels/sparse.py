"""A static mixing matrix with few nonzeros in a row."""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseRows(NamedTuple):
    """A matrix (M, N) by its nonzeros, row after row, as :func:`pm_kernels.token_mix` takes it.

    Args:
        starts: (M,) int32 or int64, nondecreasing from 0: where each row's entries start; a row may be empty.
        columns: (nonzeros,) of the same integer type: the column of each entry. A column may occur twice in a row;
            its values are added.
        values: (nonzeros,) floating point, differentiable.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, matrix: Tensor) -> "SparseRows":
        """The nonzeros of a matrix (M, N)."""
        rows, columns = matrix.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(matrix), device=matrix.device))
        return cls(starts.int(), columns.int(), matrix[rows, columns])

    def to_dense(self, columns: int) -> Tensor:
        """The matrix (M, ``columns``), differentiable in the values."""
        entries = torch.arange(len(self.columns), device=self.columns.device, dtype=self.starts.dtype)
        rows = torch.searchsorted(self.starts, entries, right=True) - 1
        dense = self.values.new_zeros(len(self.starts), columns)
        return dense.index_put((rows, self.columns.long()), self.values, accumulate=True)

    def to(self, dtype: torch.dtype) -> "SparseRows":
        """The same matrix with values of another dtype."""
        return self._replace(values=self.values.to(dtype))
