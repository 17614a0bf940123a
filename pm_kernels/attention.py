"""Attention over merged tokens, with a gate and a bias per key: contract, checks and dispatch."""

import torch
from torch import Tensor

from . import reference
from .attention_op import attention, packed_attention, supported, unpacked
from .autocast import autocast_inputs
from .backend import full_precision, use_kernels
from .checks import check_attention, check_packed_attention


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
    """Merge tokens, attend and gate: ``softmax(q k^T * scale + key_bias) * gate @ v`` over merged q, k, v.

    Every tensor argument is differentiable. The gradient of a gate of ones is the gradient-weighted attention
    score of Prune and Merge (arXiv 2503.23455), ``sum_i A[i, j] * dLoss/dA[i, j]`` for key ``j``, since
    ``dLoss/dgate_j = <v_j, sum_i A[i, j] * dout_i>``: scoring needs no attention matrix.

    Args:
        q, k, v: (B, H, N, d), one floating dtype, any strides with a contiguous last dimension (views of a packed
            qkv projection are not copied). Without ``merge``, q may have another number of tokens than k and v.
        merge: (C, N), the merge matrix: the op attends over ``merge @ q``, ``merge @ k``, ``merge @ v``.
            ``None`` merges nothing.
        gate: broadcastable to (B, H, keys), multiplies the columns of the attention matrix after the softmax.
            ``keys`` is C with ``merge`` and the tokens of k without.
        key_bias: broadcastable to (B, H, keys), added to the logits before the softmax; the logarithm of the
            number of tokens that each key stands for gives proportional attention.
        scale: factor on ``q k^T``; ``None`` is ``d ** -0.5``.
        merge_queries: ``False`` leaves the queries unmerged: N queries attend over C keys.

    Returns:
        (B, H, C, d), or (B, H, N, d) where the queries are not merged.

    Raises:
        ValueError: a shape or a device does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or the dtypes differ outside autocast.
        RuntimeError: the backend is ``"triton"``, which has no kernel for this dtype, head width (up to 128) or
            device; or a second derivative is taken on the kernels.
    """
    check_attention(q, k, v, merge, gate, key_bias)
    q, k, v, merge = autocast_inputs(q, k, v, merge)
    if _on_kernels(q, k, merge, gate, key_bias):
        return attention(q, k, v, merge, gate, key_bias, _scale(q, scale), merge_queries)[0]
    return reference.fused_merge_attention(
        q, k, v, merge, gate=gate, key_bias=key_bias, scale=scale, merge_queries=merge_queries
    )


def fused_merge_attention_qkv(
    qkv: Tensor,
    merge: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    merge_queries: bool = True,
) -> Tensor:
    """:func:`fused_merge_attention` of one packed projection, which saves its backward a copy of the gradients.

    The gradients of three views of one tensor are stacked by autograd, which reads and writes all of them once more;
    the kernels write the packed gradient at once.

    Args:
        qkv: (B, N, 3, H, d), queries, keys and values of all heads, as a ViT projects them.
        merge, gate, key_bias, scale, merge_queries: as in :func:`fused_merge_attention`.

    Returns:
        (B, H, C, d), or (B, H, N, d) where the queries are not merged.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`fused_merge_attention` does.
    """
    check_packed_attention(qkv, merge, gate, key_bias)
    qkv, merge = autocast_inputs(qkv, merge)
    q, k, v = unpacked(qkv)
    if _on_kernels(q, k, merge, gate, key_bias):
        return packed_attention(qkv, merge, gate, key_bias, _scale(q, scale), merge_queries)
    return reference.fused_merge_attention(
        q, k, v, merge, gate=gate, key_bias=key_bias, scale=scale, merge_queries=merge_queries
    )


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _on_kernels(q: Tensor, k: Tensor, merge: Tensor | None, gate: Tensor | None, key_bias: Tensor | None) -> bool:
    plain = merge is None and gate is None and key_bias is None
    return use_kernels("fused_merge_attention", q, supported(q), faster=not _pytorch_is_faster(q, k, plain))


def _pytorch_is_faster(q: Tensor, k: Tensor, plain: bool) -> bool:
    """Whether PyTorch's own attention is the faster one on a GPU.

    It is for long sequences without merge, gate or bias, for which it has kernels of its own, and for float32 at full
    precision, which takes no matrix unit.
    """
    if q.dtype == torch.float32 and full_precision():
        return True
    return plain and max(q.shape[2], k.shape[2]) > 256
