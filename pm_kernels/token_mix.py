"""Static mixes of tokens, alone and with the LayerNorm that follows: contract, checks and dispatch."""

from torch import Tensor

from . import reference
from .autocast import autocast_inputs
from .backend import require_reference
from .checks import check_layer_norm, check_token_mix
from .sparse import SparseRows


def token_mix(x: Tensor, matrix: Tensor | SparseRows) -> Tensor:
    """Mix the tokens of every image by one static matrix: ``y[b] = matrix @ x[b]``.

    Args:
        x: (B, N, D), floating point.
        matrix: (M, N), of x's dtype (under autocast any floating dtype), shared by the batch. Where rows have few
            nonzeros, :class:`SparseRows` reads no more tokens than it has entries.

    Returns:
        (B, M, D), differentiable in x and the matrix (its values, where it is sparse).

    Raises:
        ValueError: a shape or a device does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or the dtypes differ outside autocast.
        RuntimeError: the backend is ``"triton"``, which has no kernel for it yet.
    """
    check_token_mix(x, matrix)
    require_reference("token_mix", x)
    x, matrix = _autocast(x, matrix)
    return reference.token_mix(x, matrix)


def token_mix_layer_norm(
    x: Tensor, matrix: Tensor | SparseRows, weight: Tensor, bias: Tensor, eps: float, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mix the tokens and normalise the first rows of the result: ``y = matrix @ x``, ``LayerNorm(y[:, :rows])``.

    Args:
        x: (B, N, D), floating point.
        matrix: (M, N), dense or :class:`SparseRows`, as in :func:`token_mix`.
        weight, bias: (D,), the affine part of the LayerNorm, any floating dtype.
        eps: added to the variance.
        rows: how many rows to normalise, counted from the first; ``None`` is all M.

    Returns:
        The mix (B, M, D) and the normalised rows (B, rows, D), both in x's dtype (autocast's where it is on);
        the statistics are taken in float32 (float64 for float64 inputs). Differentiable in every tensor argument.

    Raises:
        ValueError: a shape, a device or ``rows`` does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or x and matrix differ in dtype outside autocast.
        RuntimeError: the backend is ``"triton"``, which has no kernel for it yet.
    """
    check_token_mix(x, matrix)
    check_layer_norm(x, matrix, weight, bias, rows)
    require_reference("token_mix_layer_norm", x)
    x, matrix = _autocast(x, matrix)
    return reference.token_mix_layer_norm(x, matrix, weight, bias, eps, rows)


def _autocast(x: Tensor, matrix: Tensor | SparseRows) -> tuple[Tensor, Tensor | SparseRows]:
    values = matrix.values if isinstance(matrix, SparseRows) else matrix
    x, cast = autocast_inputs(x, values)
    if cast is values:
        return x, matrix
    return x, matrix._replace(values=cast) if isinstance(matrix, SparseRows) else cast
