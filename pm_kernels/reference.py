"""The specification of every op in plain PyTorch: any device, any floating dtype, differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse import BlockRows, Matrix, SparseRows


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
    if isinstance(matrix, BlockRows):
        matrix = matrix.matrix
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
    mixed = token_mix(joined(x, update, carried), matrix)
    y = mixed[:, :rows]
    rest = None if rows is None or rows == mixed.shape[1] else mixed[:, rows:]
    return y, rest, None if norm is None else layer_norm(y, *norm)


def joined(x: Tensor, update: Tensor | None, carried: Tensor | None) -> Tensor:
    """The state that a transition mixes, in one tensor."""
    if update is not None:
        x = x + update
    return x if carried is None else torch.cat([x, carried], dim=1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with statistics in float32 for half-precision rows; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
