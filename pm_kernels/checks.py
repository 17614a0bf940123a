"""Validation of the ops' arguments, apart from every implementation: what is passed here is safe to launch."""

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .sparse import LISTED, BlockRows, Matrix, SparseRows


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, merge: Tensor | None, gate: Tensor | None, key_bias: Tensor | None
) -> None:
    """Arguments of ``fused_merge_attention``: q, k, v (B,H,N,d), merge (C,N), gate and key_bias (B,H,keys)."""
    _check_floating(q=q, k=k, v=v)
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, H, N, d), got {_shape(q)}")
    if k.dim() != 4 or (merge is not None and k.shape != q.shape) or _but_tokens(k) != _but_tokens(q):
        expected = f"the shape of q, {_shape(q)}" + (", but for the number of tokens" if merge is None else "")
        raise ValueError(f"k must have {expected}, got {_shape(k)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {_shape(k)}, got {_shape(v)}")
    _check_same(q, "q", dtype=True, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension (stride 1), got strides {tuple(tensor.stride())}"
            )
    _check_merge_and_keys("q", q, k, merge, gate, key_bias)


def check_packed_attention(qkv: Tensor, merge: Tensor | None, gate: Tensor | None, key_bias: Tensor | None) -> None:
    """Arguments of ``fused_merge_attention_qkv``: qkv (B,N,3,H,d), the others as in ``fused_merge_attention``."""
    _check_floating(qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape (B, N, 3, H, d), got {_shape(qkv)}")
    if qkv.stride(-1) != 1 and qkv.shape[-1] > 1:
        raise ValueError(f"qkv must have a contiguous last dimension (stride 1), got strides {tuple(qkv.stride())}")
    if merge is not None or gate is not None or key_bias is not None:
        q = qkv[:, :, 0].transpose(1, 2)
        _check_merge_and_keys("qkv", q, q, merge, gate, key_bias)


def _check_merge_and_keys(
    name: str, q: Tensor, k: Tensor, merge: Tensor | None, gate: Tensor | None, key_bias: Tensor | None
) -> None:
    """merge (C,N), gate and key_bias (B,H,keys), for q and k that have been checked as the argument ``name``."""
    _check_floating(merge=merge, gate=gate, key_bias=key_bias)
    _check_same(q, name, dtype=True, merge=merge)
    _check_same(q, name, dtype=False, gate=gate, key_bias=key_bias)
    batch, heads, tokens, _ = q.shape
    if merge is not None:
        check_matrix("merge", merge, tokens, f"the tokens of {name}")
    keys = k.shape[2] if merge is None else merge.shape[0]
    for option, tensor in (("gate", gate), ("key_bias", key_bias)):
        if tensor is not None and not _broadcasts(tensor, (batch, heads, keys)):
            raise ValueError(f"{option} must broadcast to (B, H, keys) = {(batch, heads, keys)}, got {_shape(tensor)}")


def check_token_mix(x: Tensor, matrix: Matrix) -> None:
    """Arguments of ``token_mix``: x (B,N,D), matrix (M,N), dense, sparse, or by blocks."""
    _check_floating(x=x)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, N, D), got {_shape(x)}")
    _check_structured(x, matrix, x.shape[1], "the tokens of x")


def check_transition(
    x: Tensor,
    carried: Tensor | None,
    matrix: Matrix,
    rows: int | None,
    update: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
) -> None:
    """Arguments of ``transition``: x (B,C,D), update like it, carried (B,p,D), matrix (M,C+p), rows within its."""
    _check_floating(x=x, carried=carried, update=update)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, C, D), got {_shape(x)}")
    if update is not None and update.shape != x.shape:
        raise ValueError(f"update must have the shape of x, {_shape(x)}, got {_shape(update)}")
    tokens, source = x.shape[1], "the tokens of x"
    if carried is not None:
        if carried.dim() != 3 or (carried.shape[0], carried.shape[2]) != (x.shape[0], x.shape[2]):
            expected = f"({x.shape[0]}, p, {x.shape[2]})"
            raise ValueError(f"carried must have shape (B, p, D) = {expected}, like x, got {_shape(carried)}")
        tokens, source = tokens + carried.shape[1], "the tokens of x and carried"
    _check_same(x, "x", dtype=True, update=update, carried=carried)
    _check_structured(x, matrix, tokens, source)
    if norm is not None:
        weight, bias, _ = norm
        _check_affine(x, weight, bias)
    if rows is not None:
        _check_rows(matrix, rows)


def _check_structured(x: Tensor, matrix: Matrix, tokens: int, source: str) -> None:
    if isinstance(matrix, SparseRows):
        _check_sparse(x, matrix, tokens)
        return
    if isinstance(matrix, BlockRows):
        _check_blocks(x, matrix)
        matrix = matrix.matrix
    _check_floating(matrix=matrix)
    check_matrix("matrix", matrix, tokens, source)
    _check_same(x, "x", dtype=True, matrix=matrix)


def _check_sparse(x: Tensor, matrix: SparseRows, tokens: int) -> None:
    """What can be told of sparse rows without reading their indices, which are data on the device."""
    starts, columns, values, by_column = matrix
    _check_floating(**{"matrix.values": values})
    indices = {"matrix.starts": starts, "matrix.columns": columns}
    if by_column is not None:
        indices |= {f"matrix.by_column.{name}": tensor for name, tensor in by_column._asdict().items()}
        if len(by_column.starts) != tokens:
            raise ValueError(
                f"matrix.by_column.starts must have one entry for each of {tokens} tokens, got {len(by_column.starts)}"
            )
    for name, tensor in indices.items():
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dtype != columns.dtype:
            raise TypeError(f"{name} must be int32 or int64 like matrix.columns, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got {_shape(tensor)}")
    lists = {"matrix.values": values, **{name: x for name, x in indices.items() if not name.endswith("starts")}}
    for name, tensor in lists.items():
        if tensor.shape != columns.shape:
            raise ValueError(f"{name} must have the shape of matrix.columns, {_shape(columns)}, got {_shape(tensor)}")
    _check_same(x, "x", dtype=True, **{"matrix.values": values})
    _check_same(x, "x", dtype=False, **indices)


def _check_blocks(x: Tensor, matrix: BlockRows) -> None:
    dense, starts, chunks = matrix
    for name, tensor in (("matrix.starts", starts), ("matrix.chunks", chunks)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise TypeError(f"{name} must be int32 of one dimension, got {tensor.dtype} of shape {_shape(tensor)}")
    _check_same(x, "x", dtype=False, **{"matrix.starts": starts, "matrix.chunks": chunks})
    if len(starts) != -(-dense.shape[0] // LISTED) + 1:
        raise ValueError(
            f"matrix.starts must have one entry for every {LISTED} rows of matrix {_shape(dense)} and one more, got "
            f"{len(starts)}"
        )


def check_layer_norm(x: Tensor, matrix: Matrix, weight: Tensor, bias: Tensor, rows: int | None) -> None:
    """The LayerNorm arguments of ``token_mix_layer_norm``: weight and bias (D,), rows within the matrix's."""
    _check_affine(x, weight, bias)
    if rows is not None:
        _check_rows(matrix, rows)


def _check_affine(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    _check_floating(weight=weight, bias=bias)
    width = x.shape[2]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (width,):
            raise ValueError(f"{name} must have shape (D,) = ({width},), the width of x, got {_shape(tensor)}")
    _check_same(x, "x", dtype=False, weight=weight, bias=bias)


def _check_rows(matrix: Matrix, rows: int) -> None:
    if isinstance(matrix, BlockRows):
        matrix = matrix.matrix
    available = len(matrix.starts) if isinstance(matrix, SparseRows) else matrix.shape[0]
    if not 0 <= rows <= available:
        raise ValueError(f"rows must be between 0 and {available}, the rows of matrix, got {rows}")


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
        if dtype and tensor.dtype != like.dtype and autocast_dtype(like) is None:
            raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}")


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    if tensor.dim() > len(shape):
        return False
    aligned = shape[len(shape) - tensor.dim() :]
    return all(size in (1, expected) for size, expected in zip(tensor.shape, aligned, strict=True))


def _but_tokens(tensor: Tensor) -> tuple[int, ...]:
    return tensor.shape[0], tensor.shape[1], tensor.shape[3]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
