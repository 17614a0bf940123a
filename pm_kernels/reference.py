"""The specification of every op in plain PyTorch: any device, any floating dtype, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse import SparseRows


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


def token_mix(x: Tensor, matrix: Tensor | SparseRows) -> Tensor:
    """Specification of :func:`pm_kernels.token_mix`, with the same shapes."""
    if not isinstance(matrix, SparseRows):
        return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)
    # The weighted sum of a few rows is what an embedding bag is: one bag for each row of the result.
    batch, tokens, width = x.shape
    starts, columns, values = matrix
    if batch != 1:
        image = torch.arange(batch, device=x.device, dtype=columns.dtype).unsqueeze(1)
        starts = (starts + image * len(columns)).flatten()
        columns = (columns + image * tokens).flatten()
        values = values.repeat(batch)
    mixed = F.embedding_bag(columns, x.reshape(batch * tokens, width), starts, mode="sum", per_sample_weights=values)
    return mixed.view(batch, len(matrix.starts), width)


def token_mix_layer_norm(
    x: Tensor, matrix: Tensor | SparseRows, weight: Tensor, bias: Tensor, eps: float, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Specification of :func:`pm_kernels.token_mix_layer_norm`, with the same shapes."""
    mixed = token_mix(x, matrix)
    # Statistics of half-precision rows are taken in float32; float64 stays float64.
    statistics = torch.promote_types(mixed.dtype, torch.float32)
    normed = F.layer_norm(mixed[:, :rows].to(statistics), weight.shape, weight.to(statistics), bias.to(statistics), eps)
    return mixed, normed.to(mixed.dtype)
