"""The specification of every op in plain PyTorch: any device, any floating dtype, differentiable."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


Matrix = Tensor | SparseRows


def fused_merge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merge: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    merge_queries: bool = True,
) -> Tensor:
    """Specification of :func:`pm_kernels.fused_merge_attention`, with the same shapes."""
    if merge is not None:
        q = merge @ q if merge_queries else q
        k, v = merge @ k, merge @ v
    if gate is not None:
        # (A * g) v = A (g v): a gate on the columns of the attention matrix is a gate on the rows of v.
        v = (gate.unsqueeze(-1) * v).to(v.dtype)
    bias = None if key_bias is None else key_bias.to(q.dtype).expand(*k.shape[:-1]).unsqueeze(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def token_mix(x: Tensor, matrix: Matrix) -> Tensor:
    """Specification of :func:`pm_kernels.token_mix`, with the same shapes."""
    if not isinstance(matrix, SparseRows):
        return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)
    # The weighted sum of a few rows is what an embedding bag is: one bag for each row of the result.
    batch, tokens, width = x.shape
    starts, columns, values, _ = matrix
    if batch != 1:
        image = torch.arange(batch, device=x.device, dtype=columns.dtype).unsqueeze(1)
        starts = (starts + image * len(columns)).flatten()
        columns = (columns + image * tokens).flatten()
        values = values.repeat(batch)
    mixed = F.embedding_bag(columns, x.reshape(batch * tokens, width), starts, mode="sum", per_sample_weights=values)
    return mixed.view(batch, len(matrix.starts), width)


def token_mix_layer_norm(
    x: Tensor, matrix: Matrix, weight: Tensor, bias: Tensor, eps: float, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Specification of :func:`pm_kernels.token_mix_layer_norm`, with the same shapes."""
    mixed = token_mix(x, matrix)
    return mixed, layer_norm(mixed[:, :rows], weight, bias, eps)


def transition(
    x: Tensor,
    carried: Tensor | None,
    matrix: Matrix,
    rows: int | None = None,
    *,
    update: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Specification of :func:`pm_kernels.transition`, with the same shapes."""
    state = x if update is None else x + update
    mixed = token_mix(state if carried is None else torch.cat([state, carried], dim=1), matrix)
    y = mixed[:, :rows]
    rest = None if rows is None or rows == mixed.shape[1] else mixed[:, rows:]
    return y, rest, None if norm is None else layer_norm(y, *norm)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with statistics in float32 for half-precision rows; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
