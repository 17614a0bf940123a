"""Which kernels the token mixes launch for given inputs: grids, block sizes, and buffers for the results.

A plan is made from shapes, strides and dtypes alone, so that it can be made, and its kernels compiled, for a device
that is not there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import token_mix_kernels as kernels
from .backend import full_precision
from .launch import Device, Launch, Repeats, layout
from .sparse import CHUNK, LISTED, ByColumn


class Forward(NamedTuple):
    """What the forward launches, in order, and the buffers that it fills; None where there is nothing to fill."""

    launches: list[Launch]
    y: Tensor  # (B, split, D)
    rest: Tensor | None  # (B, rows - split, D)
    normed: Tensor | None  # (B, normed, D)


class Backward(NamedTuple):
    """What the backward launches, in order, and the buffers that it fills; None where no gradient is asked for."""

    launches: list[Launch]
    dx: Tensor | None  # (B, first, D)
    dcarried: Tensor | None
    partial_dmatrix: Tensor | None  # (parts, entries) or (parts, rows, tokens) float32
    partial_daffine: Tensor | None  # (parts, 2, D) float32


class State(NamedTuple):
    """What is mixed: x + update and, after them, carried, each (B, any, D)."""

    x: Tensor | None
    update: Tensor | None = None
    carried: Tensor | None = None


def column_pieces(width: int) -> tuple[int, ...]:
    """At most three powers of two that cover ``width``, with only the last reaching past it."""
    pieces, rest = [], width
    while rest > 0:
        size = max(16, 1 << (rest.bit_length() - 1))
        if len(pieces) == 2:
            size = max(16, 1 << (rest - 1).bit_length())
        pieces.append(size)
        rest -= size
    return tuple(pieces)


def gather_rows(width: int, numbers: int) -> int:
    """Rows of a program that holds whole rows, some ``numbers`` in all: as many as spill no register on any target."""
    return max(1, min(16, 1 << (max(1, numbers // width).bit_length() - 1)))


def mix_tiles(device: Device, x: Tensor, normed: bool, listed: bool) -> tuple[int, int, int, int]:
    """Rows, columns, warps, and stages of a program that mixes by a dense matrix."""
    if listed and not normed:
        return 64, 64, 4, 2
    if x.element_size() == 4:
        return 64, 64, 4, 3
    if normed:
        return 64, 128, 4 if device.family == 100 else 8, 3
    return 128, 64, 4, 3


def plan_forward(
    device: Device,
    state: State,
    matrix: Tensor,
    structure: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    split: int,
    normed: int,
) -> Forward:
    """The mix's first ``split`` rows apart from the others, and the LayerNorm of its first ``normed``.

    ``matrix`` (rows, tokens), with zeros after its last column up to a multiple of CHUNK, or (entries,); ``structure``
    as the operator takes it.
    """
    x, update, carried = map(addressable, state)
    batch, first, width = x.shape
    rows = len(structure[0]) if matrix.dim() == 1 else matrix.shape[0]
    y = x.new_empty(batch, split, width)
    rest = x.new_empty(batch, rows - split, width) if split < rows else None
    out = x.new_empty(batch, normed, width) if normed else None
    if matrix.dim() == 2:
        launch = mix_launch(
            device, matrix, x, carried, y, rest, lists=structure, norm=(weight, bias, eps, out) if normed else None
        )
        return Forward([launch], y, rest, out)
    starts, columns = structure[:2]
    shape = whole_rows(width, 2048 if x.element_size() == 2 else 1024, x, update, carried, y)
    row_programs = -(-rows // shape["ROWS"])
    arguments = {
        **_mixed(State(x, update, carried), first),
        "p_starts": starts,
        "p_columns": columns,
        "p_values": matrix,
        "p_weight": weight if normed else None,
        "p_bias": bias if normed else None,
        "p_y": y,
        "p_rest": rest,
        "p_normed": out,
        "rows": rows,
        "entries": len(columns),
        "split": split,
        "normed": normed,
        "row_programs": row_programs,
        "eps": eps,
        **shape,
    }
    return Forward(
        [Launch(kernels.gather_forward, batch * row_programs, arguments, _warps(width), stages=1)], y, rest, out
    )


_FORWARD_TENSORS = (
    "p_x", "p_update", "p_carried", "p_matrix", "p_values", "p_weight", "p_bias", "p_starts", "p_columns", "p_chunks",
    "p_y", "p_rest", "p_normed",
)  # fmt: skip
_repeats = Repeats(_FORWARD_TENSORS)


def run_forward(
    device: Device,
    state: State,
    matrix: Tensor,
    structure: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    split: int,
    normed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Plan the forward and run it. A call like one before takes up what that one prepared."""
    dense = matrix.dim() == 2
    matrix = padded(matrix) if dense else matrix
    starts, columns = (*structure[:2], None, None)[:2]
    names = (matrix, None) if dense else (None, matrix)
    tensors = (*state, *names, weight, bias, starts, None if dense else columns, columns if dense else None)
    if not normed:
        tensors = (*tensors[:5], None, None, *tensors[7:])
    key = (device, state.x.device, eps, split, normed, precision(state.x), *map(layout, tensors))
    known = _repeats.find(key)
    if known is not None:
        prepared, shapes = known
        out = tuple(None if shape is None else state.x.new_empty(shape) for shape in shapes)
        prepared.run((*tensors, *out))
        return out
    plan = plan_forward(device, state, matrix, structure, weight, bias, eps, split, normed)
    out = (plan.y, plan.rest, plan.normed)
    shapes = tuple(None if x is None else tuple(x.shape) for x in out)
    _repeats.run(key, device, plan.launches, tensors, shapes)
    return out


def plan_backward(
    device: Device,
    dy: Tensor,
    drest: Tensor | None,
    dnormed: Tensor | None,
    state: State,
    y: Tensor | None,
    matrix: Tensor,
    structure: Sequence[Tensor],
    weight: Tensor | None,
    eps: float,
    first: int,
    tokens: int,
    wanted: Sequence[bool],
) -> Backward:
    """The gradients of what was mixed, of the matrix, and of weight and bias, as ``wanted`` asks.

    dy (B, split, D), drest (B, rows - split, D), dnormed (B, normed, D), where normed is split or drest is None; of
    ``tokens`` that were mixed, ``first`` stood in x. ``state`` is read where the matrix's gradient is asked for, and
    by a sparse matrix's norm; a dense one's reads the mix, y (B, normed or more, D).
    """
    state = State(*map(addressable, state))
    dy, drest, dnormed = map(addressable, (dy, drest, dnormed))
    batch, _, width = dy.shape
    sparse = matrix.dim() == 1
    launches, partial_daffine = [], None
    if dnormed is not None:
        mixed, rows = (state, structure) if sparse else (State(y), ())
        launch, dmixed, partial_daffine = _norm_backward(
            device, dnormed, dy, mixed, matrix, rows, first, weight, eps, wanted[2]
        )
        launches.append(launch)
        if dnormed.shape[1] < dy.shape[1]:
            drest = dy[:, dnormed.shape[1] :]
        dy = dmixed
    dx = dcarried = partial = None
    if wanted[0]:
        dx = dy.new_empty(batch, first, width)
        dcarried = dy.new_empty(batch, tokens - first, width) if first < tokens else None
    if sparse and (wanted[0] or wanted[1]):
        if wanted[1]:
            partial = torch.empty(batch, len(matrix), dtype=torch.float32, device=dy.device)
        by_column = ByColumn(*structure[2:]) if structure[2:] else ByColumn.of(*structure, tokens)
        launches.append(_gather_backward(dy, drest, state, matrix, by_column, first, dx, dcarried, partial))
    if not sparse and wanted[0]:
        launches.append(mix_launch(device, padded(matrix), dy, drest, dx, dcarried, transposed=True))
    if not sparse and wanted[1]:
        launch, partial = matrix_gradient_launch(device, dy, drest, state.x, state.carried, matrix.shape)
        launches.append(launch)
    return Backward(launches, dx, dcarried, partial, partial_daffine)


def _norm_backward(
    device: Device,
    dnormed: Tensor,
    dy: Tensor,
    mixed: State,
    matrix: Tensor,
    structure: Sequence[Tensor],
    first: int,
    weight: Tensor,
    eps: float,
    affine: bool,
) -> tuple[Launch, Tensor, Tensor | None]:
    """``mixed`` is the mix itself where ``structure`` is empty."""
    batch, normed, width = dnormed.shape
    starts, columns = structure[:2] if structure else (None, None)
    # As much as stays in registers: of float32, whose loads are wider, 4096 numbers spill on sm_80.
    shape = whole_rows(width, 4096 if dnormed.element_size() == 2 else 3072, *mixed, dnormed, dy)
    row_programs = -(-normed // shape["ROWS"])
    items = batch * row_programs
    programs = min(items, 4 * device.multiprocessors)
    dmixed = dnormed.new_empty(batch, normed, width)
    partial = torch.empty(programs, 2, width, dtype=torch.float32, device=dnormed.device) if affine else None
    arguments = {
        **_mixed(mixed, first),
        "p_starts": starts,
        "p_columns": columns,
        "p_values": matrix if structure else None,
        "p_weight": weight,
        "p_dnormed": dnormed,
        "p_dy": dy,
        "p_dmixed": dmixed,
        "p_partial": partial,
        "rows": len(starts) if structure else normed,
        "entries": len(columns) if structure else 0,
        "normed": normed,
        "row_programs": row_programs,
        "items": items,
        "programs": programs,
        "stride_nb": dnormed.stride(0),
        "stride_nn": dnormed.stride(1),
        **_strides("y", dy),
        "eps": eps,
        **shape,
    }
    return Launch(kernels.norm_backward, programs, arguments, warps=8, stages=1), dmixed, partial


def _gather_backward(
    dy: Tensor,
    drest: Tensor | None,
    state: State,
    values: Tensor,
    by_column: ByColumn,
    first: int,
    dx: Tensor | None,
    dcarried: Tensor | None,
    partial: Tensor | None,
) -> Launch:
    batch, split, width = dy.shape
    shape = whole_rows(width, 2048 if dy.element_size() == 2 else 512, *state, dy, drest)
    tokens = len(by_column.starts)
    row_programs = -(-tokens // shape["ROWS"])
    arguments = {
        **_mixed(State(None) if partial is None else state, first),
        "p_dy": dy,
        "p_drest": drest,
        "p_starts": by_column.starts,
        "p_rows": by_column.rows,
        "p_entries": by_column.entries,
        "p_values": values,
        "p_dx": dx,
        "p_dcarried": dcarried,
        "p_partial": partial,
        "tokens": tokens,
        "entries": len(values),
        "split": split,
        "row_programs": row_programs,
        **_strides("y", dy),
        **_strides("r", drest),
        **shape,
    }
    return Launch(kernels.gather_backward, batch * row_programs, arguments, _warps(width), stages=1)


def mix_launch(
    device: Device,
    matrix: Tensor,
    x: Tensor,
    carried: Tensor | None,
    y: Tensor,
    rest: Tensor | None = None,
    *,
    lists: Sequence[Tensor] = (),
    norm: tuple[Tensor, Tensor, float, Tensor] | None = None,
    transposed: bool = False,
) -> Launch:
    """[y; rest] = matrix @ [x; carried], or matrix^T @ ...; matrix padded; ``norm``: weight, bias, eps, result."""
    batch, first, width = x.shape
    rows = y.shape[1] + (0 if rest is None else rest.shape[1])
    block, columns, warps, stages = mix_tiles(device, x, norm is not None, bool(lists))
    row_programs = -(-rows // block)
    width_programs = 1 if norm is not None else -(-width // columns)
    weight, bias, eps, normed = norm or (None, None, 0.0, None)
    starts, chunks = lists or (None, None)
    arguments = {
        "p_matrix": matrix,
        "p_starts": starts,
        "p_chunks": chunks,
        "p_x": x,
        "p_carried": carried,
        "p_weight": weight,
        "p_bias": bias,
        "p_y": y,
        "p_rest": rest,
        "p_normed": normed,
        "rows": rows,
        "tokens": first + (0 if carried is None else carried.shape[1]),
        "padded": matrix.shape[1],
        "first": first,
        "split": y.shape[1],
        "normed": 0 if normed is None else normed.shape[1],
        "width": width,
        "row_programs": row_programs,
        "width_programs": width_programs,
        "stride_matrix": matrix.stride(0),
        **_strides("x", x),
        **_strides("c", carried),
        **_strides("y", y),
        **_strides("r", rest),
        "eps": eps,
        "TRANSPOSED": transposed,
        "ROWS": block,
        "COLUMNS": columns,
        "CHUNK": CHUNK,
        "LISTED": LISTED,
        "STAGES": stages,
        "ALIGNED": aligned(x, carried, y, rest),
        "PRECISION": precision(x),
    }
    return Launch(kernels.mix, batch * row_programs * width_programs, arguments, warps=warps, stages=stages)


def matrix_gradient_launch(
    device: Device, dy: Tensor, drest: Tensor | None, x: Tensor, carried: Tensor | None, shape: Sequence[int]
) -> tuple[Launch, Tensor]:
    """The gradient of a matrix of ``shape`` (rows, tokens) for [dy; drest] = matrix @ [x; carried], in parts."""
    batch, first, width = x.shape
    rows, tokens = shape
    row_programs, token_programs = -(-rows // 64), -(-tokens // 64)
    splits = max(1, min(batch, 2 * device.multiprocessors // max(1, row_programs * token_programs)))
    partial = torch.empty(splits, rows, tokens, dtype=torch.float32, device=x.device)
    stages = 2 if device.family == 90 and x.element_size() == 2 else 1
    arguments = {
        "p_dy": dy,
        "p_drest": drest,
        "p_x": x,
        "p_carried": carried,
        "p_partial": partial,
        "batch": batch,
        "rows": rows,
        "tokens": tokens,
        "split": dy.shape[1],
        "first": first,
        "width": width,
        **_strides("y", dy),
        **_strides("r", drest),
        **_strides("x", x),
        **_strides("c", carried),
        "row_programs": row_programs,
        "token_programs": token_programs,
        "splits": splits,
        "ROWS": 64,
        "TOKENS": 64,
        "CHUNK": 64 if x.element_size() == 2 and device.family > 80 else 32,
        "STAGES": stages,
        "ALIGNED": aligned(dy, drest, x, carried),
        "PRECISION": precision(x),
    }
    grid = row_programs * token_programs * splits
    warps = 8 if device.family == 80 else 4
    return Launch(kernels.matrix_gradient, grid, arguments, warps, stages), partial


def whole_rows(width: int, numbers: int, *tensors: Tensor | None) -> dict[str, Any]:
    """The compiled-in shape of a program that holds whole rows of these tensors, some ``numbers`` in all."""
    pieces = column_pieces(width)
    return {
        "ROWS": gather_rows(width, numbers),
        "WIDTH": width,
        "PIECES": pieces,
        "WHOLE": sum(pieces) == width,
        "ALIGNED": aligned(*tensors),
    }


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every row starts at a multiple of 16 bytes, in these tensors (B, N, D) and in new ones like them."""
    return all(
        x is None
        or (
            not any(offset * x.element_size() % 16 for offset in (x.shape[2], *x.stride()[:2]))
            and x.data_ptr() % 16 == 0
        )
        for x in tensors
    )


def _mixed(state: State, first: int) -> dict[str, Any]:
    x, update, carried = state
    return {
        "p_x": x,
        "p_update": update,
        "p_carried": carried,
        "first": first,
        **_strides("x", x),
        **_strides("u", update),
        **_strides("c", carried),
    }


def _warps(width: int) -> int:
    """Warps of a program that holds whole rows."""
    return 4 if width <= 2048 else 8


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    batch, rows = (0, 0) if tensor is None else tensor.stride()[:2]
    return {f"stride_{name}b": batch, f"stride_{name}n": rows}


def addressable(x: Tensor | None) -> Tensor | None:
    """x (B, N, D) as the kernels address it: contiguous rows, and an image's rows within 2^31 elements."""
    if x is None or (x.stride(2) == 1 and x.stride(1) * max(1, x.shape[1] - 1) < 2**31 - x.shape[2]):
        return x
    return x.contiguous()


def padded(matrix: Tensor) -> Tensor:
    """A matrix with zeros after its last column, up to a multiple of CHUNK, for wide loads."""
    missing = -matrix.shape[1] % CHUNK
    return F.pad(matrix, (0, missing)) if missing else matrix.contiguous()


def precision(x: Tensor) -> str:
    """How products of float32 are taken, by PyTorch's own setting for matrix products; of no meaning for others."""
    return "ieee" if x.dtype == torch.float32 and full_precision() else "tf32"
