"""Validation of the ops' arguments, apart from every implementation: what is passed here is safe to launch."""

import torch
from torch import Tensor


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, merge: Tensor | None, gate: Tensor | None, key_bias: Tensor | None
) -> None:
    """Arguments of ``fused_merge_attention``: q, k, v (B,H,N,d), merge (C,N), gate and key_bias (B,H,keys)."""
    _check_floating(q=q, k=k, v=v, merge=merge, gate=gate, key_bias=key_bias)
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, H, N, d), got {_shape(q)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {_shape(q)}, got {_shape(tensor)}")
    _check_same(q, "q", dtype=True, k=k, v=v, merge=merge)
    _check_same(q, "q", dtype=False, gate=gate, key_bias=key_bias)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension (stride 1), got strides {tuple(tensor.stride())}"
            )
    batch, heads, tokens, _ = q.shape
    if merge is not None:
        check_matrix("merge", merge, tokens, "the tokens of q")
    keys = tokens if merge is None else merge.shape[0]
    for name, tensor in (("gate", gate), ("key_bias", key_bias)):
        if tensor is not None and not _broadcasts(tensor, (batch, heads, keys)):
            raise ValueError(f"{name} must broadcast to (B, H, keys) = {(batch, heads, keys)}, got {_shape(tensor)}")


def check_token_mix(x: Tensor, matrix: Tensor) -> None:
    """Arguments of ``token_mix``: x (B,N,D), matrix (M,N)."""
    _check_floating(x=x, matrix=matrix)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, N, D), got {_shape(x)}")
    check_matrix("matrix", matrix, x.shape[1], "the tokens of x")
    _check_same(x, "x", dtype=True, matrix=matrix)


def check_layer_norm(x: Tensor, matrix: Tensor, weight: Tensor, bias: Tensor, rows: int | None) -> None:
    """The LayerNorm arguments of ``token_mix_layer_norm``: weight and bias (D,), rows within the matrix's."""
    _check_floating(weight=weight, bias=bias)
    width = x.shape[2]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (width,):
            raise ValueError(f"{name} must have shape (D,) = ({width},), the width of x, got {_shape(tensor)}")
    _check_same(x, "x", dtype=False, weight=weight, bias=bias)
    if rows is not None and not 0 <= rows <= matrix.shape[0]:
        raise ValueError(f"rows must be between 0 and {matrix.shape[0]}, the rows of matrix, got {rows}")


def check_matrix(name: str, matrix: Tensor, tokens: int, source: str) -> None:
    if matrix.dim() != 2 or matrix.shape[1] != tokens:
        rows = "C" if name == "merge" else "M"
        raise ValueError(f"{name} must have shape ({rows}, N) with N = {tokens} ({source}), got {_shape(matrix)}")


def _check_floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def _check_same(like: Tensor, like_name: str, dtype: bool, **tensors: Tensor | None) -> None:
    """Each tensor on the device of ``like`` and, where ``dtype`` is set and no autocast decides, of its dtype."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, the device of {like_name}, got {tensor.device}")
        if dtype and tensor.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
            raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}")


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    if tensor.dim() > len(shape):
        return False
    aligned = shape[len(shape) - tensor.dim() :]
    return all(size in (1, expected) for size, expected in zip(tensor.shape, aligned, strict=True))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
