"""Static mixes of tokens, alone and with the LayerNorm that follows: contract, checks, autograd, registration."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import reference, runtime
from .reference import ByColumn, Matrix, SparseRows
from .runtime import Known, check_tensor

WIDEST = 4096


class Mix(NamedTuple):
    """The arguments of the op: ``matrix @ [x + update; carried]``, as :func:`transition` names them.

    Args:
        split: how many rows of the result are a tensor of their own; ``None`` is all.
        normed: how many rows have a LayerNorm, where there is a norm: all, split, or 0; ``None`` is all.
    """

    x: Tensor
    update: Tensor | None
    carried: Tensor | None
    matrix: Matrix
    norm: tuple[Tensor, Tensor, float] | None = None
    split: int | None = None
    normed: int | None = None

    @classmethod
    def of(cls, *operands: Tensor | float | int | None) -> "Mix":
        """The arguments from those of the registered operator, see :meth:`operands`."""
        x, update, carried, values, starts, columns, *by_column, weight, bias, eps, split, normed = operands
        by_column = None if by_column[0] is None else ByColumn(*by_column)
        matrix = values if starts is None else SparseRows(starts, columns, values, by_column)
        return cls(x, update, carried, matrix, None if weight is None else (weight, bias, eps), split, normed)

    def operands(self) -> tuple[Tensor | float | int | None, ...]:
        """The arguments as the registered operator takes them."""
        starts, columns, values, by_column = self.matrix if self.is_sparse() else (None, None, self.matrix, None)
        by_column, norm = by_column or (None, None, None), self.norm or (None, None, 0.0)
        _, split, normed = self.counts()
        return *self[:3], values, starts, columns, *by_column, *norm, split, normed

    def is_sparse(self) -> bool:
        """Whether the matrix is given by its nonzeros."""
        return isinstance(self.matrix, SparseRows)

    def counts(self) -> tuple[int, int, int]:
        """Rows of the result, of them those in the first tensor, and those with a LayerNorm."""
        rows = self.matrix.starts.shape[-1] if self.is_sparse() else self.matrix.shape[-2]
        normed = rows if self.normed is None else self.normed
        return rows, rows if self.split is None else self.split, 0 if self.norm is None else normed

    def check(self, op: str) -> None:
        """Raise what the public functions do where the arguments do not fit together."""
        x, update, carried, matrix = self[:4]
        for name, tensor in (("x", x), ("carried", carried), ("update", update)):
            if tensor is not None or name == "x":
                check_tensor(name, tensor)
        if x.dim() != 3:
            raise ValueError(f"x must have shape (B, {'C' if op == 'transition' else 'N'}, D), got {tuple(x.shape)}")
        batch, tokens, width = x.shape
        source = "the tokens of x"
        if update is not None:
            if update.shape != x.shape:
                raise ValueError(f"update must have the shape of x, {tuple(x.shape)}, got {tuple(update.shape)}")
            check_tensor("update", update, x, "x")
        if carried is not None:
            if carried.dim() != 3 or (carried.shape[0], carried.shape[2]) != (batch, width):
                raise ValueError(
                    f"carried must have shape (B, p, D) = ({batch}, p, {width}), like x, got {tuple(carried.shape)}"
                )
            check_tensor("carried", carried, x, "x")
            tokens, source = tokens + carried.shape[1], "the tokens of x and carried"
        if self.is_sparse():
            _check_sparse(x, matrix, tokens)
        else:
            check_tensor("matrix", matrix)
            by_image = matrix.dim() == 3 and matrix.shape[0] == batch
            if matrix.dim() != (3 if by_image else 2) or matrix.shape[-1] != tokens:
                raise ValueError(
                    f"matrix must have shape (M, N) with N = {tokens} ({source}), got {tuple(matrix.shape)}"
                )
            check_tensor("matrix", matrix, x, "x")
        if self.norm is not None:
            weight, bias, _ = self.norm
            for name, tensor in (("weight", weight), ("bias", bias)):
                check_tensor(name, tensor)
                if tuple(tensor.shape) != (width,):
                    raise ValueError(
                        f"{name} must have shape (D,) = ({width},), the width of x, got {tuple(tensor.shape)}"
                    )
                check_tensor(name, tensor, x, "x", dtype=False)
        available = self.counts()[0]
        for rows in (self.split, self.normed):
            if rows is not None and not 0 <= rows <= available:
                raise ValueError(f"rows must be between 0 and {available}, the rows of matrix, got {rows}")

    def cast(self, dtype: torch.dtype) -> "Mix":
        """The call under autocast: weight and bias of the norm keep their dtype."""
        x, update, carried = (runtime.cast(tensor, dtype) for tensor in self[:3])
        matrix = self.matrix
        if self.is_sparse():
            matrix = matrix._replace(values=runtime.cast(matrix.values, dtype))
        return self._replace(x=x, update=update, carried=carried, matrix=runtime.cast(matrix, dtype))

    def supported(self) -> bool:
        """Whether there are kernels for x's dtype and width."""
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        by_image = not self.is_sparse() and self.matrix.dim() == 3
        return self.x.dtype in dtypes and 1 <= self.x.shape[-1] <= WIDEST and not by_image

    def faster(self) -> bool:
        """Whether the kernels are faster on a GPU than a product by PyTorch: where memory bounds it, not arithmetic."""
        if self.is_sparse():
            return True
        if self.x.dtype == torch.float32 and runtime.full_precision():
            return False
        rows, tokens = self.matrix.shape
        return 2 * rows * tokens <= 512 * (rows + tokens)

    def results(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Memory for the first rows, for the others and for the LayerNorm; None where there is nothing to hold."""
        rows, split, normed = self.counts()
        batch, _, width = self.x.shape
        return (
            self.x.new_empty(batch, split, width),
            self.x.new_empty(batch, rows - split, width) if split != rows else None,
            self.x.new_empty(batch, normed, width) if normed else None,
        )

    def flops(self) -> int:
        """Floating-point operations of the product with the matrix, or with its nonzeros."""
        values = self.matrix.values if self.is_sparse() else self.matrix
        images = 1 if values.dim() == (2 if self.is_sparse() else 3) else self.x.shape[0]
        return 2 * images * self.x.shape[2] * values.numel()


def _check_sparse(x: Tensor, matrix: SparseRows, tokens: int) -> None:
    """What can be told of sparse rows without reading their indices, which are data on the device."""
    starts, columns, values, by_column = matrix
    check_tensor("matrix.values", values)
    indices = {"matrix.starts": starts, "matrix.columns": columns}
    if by_column is not None:
        indices |= {f"matrix.by_column.{name}": tensor for name, tensor in by_column._asdict().items()}
        if by_column.starts.shape[-1] != tokens:
            raise ValueError(
                f"matrix.by_column.starts must have one entry for each of {tokens} tokens, "
                f"got {by_column.starts.shape[-1]}"
            )
    for name, tensor in indices.items():
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dtype != columns.dtype:
            raise TypeError(f"{name} must be int32 or int64 like matrix.columns, got {tensor.dtype}")
        by_image = starts.dim() == 2 and len(tensor) == x.shape[0]
        if tensor.dim() != (2 if by_image else 1):
            raise ValueError(
                f"{name} must have one dimension, got {tuple(tensor.shape)}; or, where every image has a matrix of its "
                f"own, all must have two, (B, ...) with B = {x.shape[0]}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, the device of x, got {tensor.device}")
    for name, tensor in {"matrix.values": values, **indices}.items():
        if not name.endswith("starts") and tensor.shape != columns.shape:
            expected = tuple(columns.shape)
            raise ValueError(f"{name} must have the shape of matrix.columns, {expected}, got {tuple(tensor.shape)}")
    check_tensor("matrix.values", values, x, "x")


def token_mix(x: Tensor, matrix: Matrix) -> Tensor:
    """Mix the tokens of every image by one static matrix: ``y[b] = matrix @ x[b]``.

    Args:
        x: (B, N, D), floating point.
        matrix: (M, N), of x's dtype (under autocast any floating dtype), shared by the batch. Where rows have few
            nonzeros, :class:`SparseRows` reads no more tokens than it has entries. A matrix for each image,
            (B, M, N), is taken by PyTorch alone.

    Returns:
        (B, M, D), differentiable in x and the matrix (its values, where it is sparse).

    Raises:
        ValueError: a shape or a device does not fit; the message names the argument.
        TypeError: an argument is no floating-point tensor, or the dtypes differ outside autocast.
        RuntimeError: the backend is ``"triton"``, which has no kernel for this dtype, width (up to 4096) or device; or
            a second derivative is taken on the kernels.
    """
    call, known, how = runtime.settle(Mix(x, None, None, matrix), "token_mix")
    if known.device is None:
        return reference.token_mix(call.x, call.matrix)
    return _mixed(call, known, how)[0]


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
    call = Mix(x, None, None, matrix, (weight, bias, eps), None, rows)
    call, known, how = runtime.settle(call, "token_mix_layer_norm")
    if known.device is None:
        return reference.token_mix_layer_norm(call.x, call.matrix, weight, bias, eps, rows)
    y, _, normed = _mixed(call, known, how)
    return y, normed


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
    call, known, how = runtime.settle(Mix(x, update, carried, matrix, norm, rows, rows), "transition")
    if known.device is None:
        return reference.transition(call.x, call.carried, call.matrix, rows, update=call.update, norm=norm)
    return _mixed(call, known, how)


def _mixed(call: Mix, known: Known, how: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if call.update is not None and not call.is_sparse():
        call = call._replace(x=call.x + call.update, update=None)  # the matrix unit takes its operands from memory
    operands = call.operands()
    if how == "launch":
        y, rest, normed = _run(known, operands)
    elif how == "record":
        y, rest, normed = _Recorded.apply(known, *operands)
    else:
        y, rest, normed = mix(*operands)
        rest = rest if rest.shape[1] else None
    if call.norm is None:
        return y, rest, None
    return y, rest, y[:, :0] if normed is None else normed


def _run(known: Known, operands: Sequence[Tensor | float | int | None]) -> Sequence[Tensor | None]:
    """The first rows, the others and the LayerNorm; None where there are none."""
    *tensors, eps, split, normed = operands
    if tensors[4] is None:
        tensors[3] = runtime.padded(tensors[3])
    if normed == 0:
        tensors[9:] = None, None
    with runtime.on_device(tensors[0]):
        results = known.repeat(tensors)
        if results is None:
            from .mixing_plan import plan_forward

            results = known.run(plan_forward(known.device, Mix.of(*tensors, eps, split, normed)), tensors)
    return results


def _filled(call: Mix, results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The results of the operator, whose type knows no None."""
    batch, _, width = call.x.shape
    return tuple(call.x.new_empty(batch, 0, width) if part is None else part for part in results)


def _forward(*operands: Tensor | float | int | None) -> tuple[Tensor, ...]:
    call, known, _ = runtime.settle(Mix.of(*operands))
    return _filled(call, _run(known, operands))


def _forward_fake(*operands: Tensor | float | int | None) -> tuple[Tensor, ...]:
    call = Mix.of(*operands)
    return _filled(call, call.results())


def _backward(
    dy: Tensor | None,
    drest: Tensor | None,
    dnormed: Tensor | None,
    y: Tensor | None,
    first: int,
    tokens: int,
    *operands: Tensor | float | int | list[bool] | None,
) -> tuple[Tensor, ...]:
    """Gradients of the tokens, ``first`` of all ``tokens`` and the others, of the matrix, and of weight and bias.

    ``wanted`` asks for those of tokens, matrix, and norm; the others are empty. x, update and carried are given where
    the matrix's gradient or the norm of a sparse mix is asked for; a dense one's norm reads the mix, ``y``.
    """
    *operands, wanted = operands
    call = Mix.of(*operands)
    given = _given(dy, drest, dnormed)
    rows, split, _ = call.counts()
    if dy is None:
        dy = given.new_zeros(given.shape[0], split, given.shape[2])
    if split == rows:
        drest = None
    elif drest is None:
        drest = given.new_zeros(given.shape[0], rows - split, given.shape[2])
    known = runtime.settle_backward(dy, drest, dnormed, y, first, tokens, *operands, *wanted)
    values = operands[3]
    if not call.is_sparse():
        call = call._replace(matrix=runtime.padded(values))
    tensors = (dy, drest, dnormed, y, *call.operands()[:11])
    with runtime.on_device(given):
        results = known.repeat(tensors)
        if results is None:
            from .mixing_plan import plan_backward

            plan = plan_backward(known.device, call, (dy, drest, dnormed), y, first, tokens, wanted)
            results = known.run(plan, tensors)
    dx, dcarried, dmatrix, partial_daffine = results
    daffine = (None, None)
    if partial_daffine is not None:
        weight = call.norm[0]
        daffine = (part.to(weight.dtype, copy=True) for part in partial_daffine.sum(0))
    if dmatrix is not None:
        by_image = call.is_sparse() and values.dim() == 2
        dmatrix = (dmatrix if by_image else dmatrix.sum(0)).to(values.dtype)
    return tuple(given.new_empty(0) if part is None else part for part in (dx, dcarried, dmatrix, *daffine))


def _backward_fake(
    dy: Tensor | None,
    drest: Tensor | None,
    dnormed: Tensor | None,
    y: Tensor | None,
    first: int,
    tokens: int,
    *operands: Tensor | float | int | list[bool] | None,
) -> tuple[Tensor, ...]:
    *operands, wanted = operands
    values, weight, given = operands[3], operands[9], _given(dy, drest, dnormed)
    batch, _, width = given.shape
    return (
        given.new_empty(batch, first, width) if wanted[0] else given.new_empty(0),
        given.new_empty(batch, tokens - first, width) if wanted[0] and first != tokens else given.new_empty(0),
        torch.empty_like(values, memory_format=torch.contiguous_format) if wanted[1] else given.new_empty(0),
        *(torch.empty_like(weight) if wanted[2] and dnormed is not None else given.new_empty(0) for _ in range(2)),
    )


def _given(*gradients: Tensor | None) -> Tensor | None:
    return next((gradient for gradient in gradients if gradient is not None), None)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, known: Known | None, *operands: Tensor | float | int | None
    ) -> tuple[Tensor | None, ...]:
        if known is None:
            with torch._C._AutoDispatchBelowAutograd():
                y, rest, normed = mix(*operands)
        else:
            y, rest, normed = _run(known, operands)
        x, update, carried, values, *structure, weight, _, ctx.eps, ctx.split, ctx.normed = operands
        ctx.first, ctx.tokens = x.shape[1], x.shape[1] + (0 if carried is None else carried.shape[1])
        sparse = structure[0] is not None
        # A sparse mix is made again in the backward, which costs less than to keep it.
        read = ctx.needs_input_grad[4] or (sparse and ctx.normed)
        state = (x, update, carried) if read else (None, None, None)
        ctx.save_for_backward(y if ctx.normed and not sparse else None, *state, values, *structure, weight)
        ctx.set_materialize_grads(False)
        return y, rest, normed

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        y, *saved = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        dy, drest, dnormed = gradients
        dnormed = dnormed if ctx.normed else None
        if _given(dy, drest, dnormed) is None:
            return (None,) * (1 + len(needs))
        wanted = [any(needs[:3]), needs[3], dnormed is not None and any(needs[9:11])]
        dx, dcarried, dvalues, dweight, dbias = mix_backward(
            dy, drest, dnormed, y, ctx.first, ctx.tokens, *saved, None, ctx.eps, ctx.split, ctx.normed, wanted
        )
        norm = (dweight, dbias) if wanted[2] else (None, None)
        results = (dx, dx, dcarried, dvalues, *(None,) * 5, *norm, None, None, None)
        return None, *(result if need else None for result, need in zip(results, needs, strict=True))


def _backward_flops(
    dy: Tensor | None,
    drest: Tensor | None,
    dnormed: Tensor | None,
    y: object,
    first: int,
    tokens: int,
    *operands: object,
) -> int:
    *operands, wanted = operands
    return sum(wanted[:2]) * Mix.of(*operands)._replace(x=_given(dy, drest, dnormed)).flops()


_ARGUMENTS = (
    "Tensor? update, Tensor? carried, Tensor values, Tensor? starts, Tensor? columns, Tensor? by_starts, "
    "Tensor? by_rows, Tensor? by_entries, Tensor? weight, Tensor? bias, float eps, SymInt split, SymInt normed"
)
mix = runtime.register(
    f"mix(Tensor x, {_ARGUMENTS}) -> (Tensor y, Tensor rest, Tensor normed_rows)",
    _forward,
    _forward_fake,
    _Recorded,
    lambda *operands: Mix.of(*operands).flops(),
)
mix_backward = runtime.register(
    "mix_backward(Tensor? dy, Tensor? drest, Tensor? dnormed, Tensor? y, SymInt first, SymInt tokens, Tensor? x, "
    f"{_ARGUMENTS}, bool[3] wanted) -> (Tensor dx, Tensor dcarried, Tensor dvalues, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
    "token mixes cannot be differentiated twice on their kernels",
    _backward_flops,
)
