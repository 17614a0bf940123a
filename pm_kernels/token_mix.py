"""Static mixes of tokens, alone and with the LayerNorm that follows: contract, checks and dispatch."""

import torch
from torch import Tensor

from . import reference
from .autocast import autocast_dtype, autocast_inputs
from .backend import full_precision, use_kernels
from .checks import check_layer_norm, check_token_mix, check_transition
from .sparse import BlockRows, Matrix, SparseRows
from .token_mix_op import mix, supported


def token_mix(x: Tensor, matrix: Matrix) -> Tensor:
    """Mix the tokens of every image by one static matrix: ``y[b] = matrix @ x[b]``.

    Args:
        x: (B, N, D), floating point.
        matrix: (M, N), of x's dtype (under autocast any floating dtype), shared by the batch. Where rows have few
            nonzeros, :class:`SparseRows` reads no more tokens than it has entries; where nonzeros come in blocks, the
            products of :class:`BlockRows` leave the others out.

    Returns:
        (B, M, D), differentiable in x and the matrix (its values, where it is sparse).

    Raises:
        ValueError: a shape or a device does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or the dtypes differ outside autocast.
        RuntimeError: the backend is ``"triton"``, which has no kernel for this dtype, width (up to 4096) or device; or
            a second derivative is taken on the kernels.
    """
    check_token_mix(x, matrix)
    x, _, _, matrix = _autocast(x, None, None, matrix)
    if _on_kernels("token_mix", x, matrix):
        return _mix(x, None, None, matrix, None, _rows(matrix), 0)[0]
    return reference.token_mix(x, matrix)


def token_mix_layer_norm(
    x: Tensor, matrix: Matrix, weight: Tensor, bias: Tensor, eps: float, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mix the tokens and normalise the first rows of the result: ``y = matrix @ x``, ``LayerNorm(y[:, :rows])``.

    Args:
        x: (B, N, D), floating point.
        matrix: (M, N), as in :func:`token_mix`.
        weight, bias: (D,), the affine part of the LayerNorm, any floating dtype.
        eps: added to the variance.
        rows: how many rows to normalise, counted from the first; ``None`` is all M.

    Returns:
        The mix (B, M, D) and the normalised rows (B, rows, D), both in x's dtype (autocast's where it is on);
        the statistics are taken in float32 (float64 for float64 inputs). Differentiable in every tensor argument.

    Raises:
        ValueError: a shape, a device or ``rows`` does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or x and matrix differ in dtype outside autocast.
        RuntimeError: as :func:`token_mix` does.
    """
    check_token_mix(x, matrix)
    check_layer_norm(x, matrix, weight, bias, rows)
    x, _, _, matrix = _autocast(x, None, None, matrix)
    if _on_kernels("token_mix_layer_norm", x, matrix):
        total = _rows(matrix)
        rows = total if rows is None else rows
        y, _, normed = _mix(x, None, None, matrix, (weight, bias, eps), total, rows)
        return y, normed
    return reference.token_mix_layer_norm(x, matrix, weight, bias, eps, rows)


def transition(
    x: Tensor,
    carried: Tensor | None,
    matrix: Matrix,
    rows: int | None = None,
    *,
    update: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Take the state of a compressed model to the next one: ``[y; rest] = matrix @ [x + update; carried]``.

    The state is in two tensors, the tokens that a block computes and the tokens that are carried past it, and so is the
    next one: nothing is concatenated or split in memory. With ``update``, the sum that ends a block is a part of the
    mix; with ``norm``, the LayerNorm that begins the next block is.

    Args:
        x: (B, C, D), the tokens that a block computed, or all but its last sum.
        carried: (B, p, D), the tokens that were carried past it, or ``None``.
        matrix: (M, C + p), as in :func:`token_mix`.
        rows: how many rows of the result the next block computes; ``None`` is all M.
        update: (B, C, D), added to x: what the block's last branch gave.
        norm: weight (D,), bias (D,) and epsilon of the LayerNorm of ``y``.

    Returns:
        y (B, rows, D); rest (B, M - rows, D), ``None`` where M is ``rows``; LayerNorm(y), ``None`` without ``norm``.
        Differentiable in every tensor argument.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`token_mix_layer_norm` does.
    """
    check_transition(x, carried, matrix, rows, update, norm)
    x, update, carried, matrix = _autocast(x, update, carried, matrix)
    if _on_kernels("transition", x, matrix):
        total = _rows(matrix)
        rows = total if rows is None else rows
        y, rest, normed = _mix(x, update, carried, matrix, norm, rows, 0 if norm is None else rows)
        return y, rest if rows < total else None, None if norm is None else normed
    return reference.transition(x, carried, matrix, rows, update=update, norm=norm)


def _mix(
    x: Tensor,
    update: Tensor | None,
    carried: Tensor | None,
    matrix: Matrix,
    norm: tuple[Tensor, Tensor, float] | None,
    split: int,
    normed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, eps = norm or (None, None, 0.0)
    if isinstance(matrix, SparseRows):
        structure = [matrix.starts, matrix.columns, *(matrix.by_column or ())]
        return mix(x, update, carried, matrix.values, structure, weight, bias, eps, split, normed)
    if update is not None:
        x, update = x + update, None  # the matrix unit takes its operands from memory
    structure = []
    if isinstance(matrix, BlockRows):
        matrix, *structure = matrix
    return mix(x, update, carried, matrix, structure, weight, bias, eps, split, normed)


def _on_kernels(op: str, x: Tensor, matrix: Matrix) -> bool:
    return use_kernels(op, x, supported(x), faster=isinstance(matrix, SparseRows) or not _pytorch_is_faster(x, matrix))


def _pytorch_is_faster(x: Tensor, matrix: Tensor | BlockRows) -> bool:
    """Whether a product by PyTorch is the faster one on a GPU: where arithmetic bounds it, not memory."""
    if isinstance(matrix, BlockRows):
        return False
    if x.dtype == torch.float32 and full_precision():
        return True
    rows, tokens = matrix.shape
    return 2 * rows * tokens > 512 * (rows + tokens)


def _rows(matrix: Matrix) -> int:
    if isinstance(matrix, SparseRows):
        return len(matrix.starts)
    return (matrix.matrix if isinstance(matrix, BlockRows) else matrix).shape[0]


def _autocast(
    x: Tensor, update: Tensor | None, carried: Tensor | None, matrix: Matrix
) -> tuple[Tensor, Tensor | None, Tensor | None, Matrix]:
    if autocast_dtype(x) is None:
        return x, update, carried, matrix
    if isinstance(matrix, Tensor):
        return autocast_inputs(x, update, carried, matrix)
    x, update, carried = autocast_inputs(x, update, carried)
    return x, update, carried, matrix.to(x.dtype)
