"""Which kernels the token mixes launch for given inputs: grids, block sizes, and buffers for the results.

A plan is made from shapes, strides and dtypes alone, so that it can be made, and its kernels compiled, for a device
that is not there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import mixing_kernels as kernels
from . import row_kernels
from .launches import Launch, Plan
from .mixing import Mix
from .reference import ByColumn, SparseRows
from .runtime import CHUNK, Device, precision


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


def mix_tiles(device: Device, x: Tensor, normed: bool) -> tuple[int, int, int, int]:
    """Rows, columns, warps, and stages of a program that mixes by a dense matrix."""
    if x.element_size() == 4:
        return 64, 64, 4, 3
    if normed:
        return 64, 128, 4 if device.family == 100 else 8, 3
    return 128, 64, 4, 3


def plan_forward(device: Device, call: Mix) -> Plan:
    """What the forward launches to fill its results. A dense matrix has been padded."""
    y, rest, normed = results = call.results()
    x, update, carried = map(addressable, call[:3])
    if not call.is_sparse():
        norm = (*call.norm, normed) if call.norm else None
        return Plan([mix_launch(device, call.matrix, x, carried, y, rest, norm=norm)], results)
    weight, bias, eps = call.norm or (None, None, 0.0)
    rows, split, count = call.counts()
    width = x.shape[2]
    shape = whole_rows(width, 2048 if x.element_size() == 2 else 1024, x, update, carried, y)
    row_programs = -(-rows // shape["ROWS"])
    arguments = _mixed(x, update, carried, x.shape[1]) | _by_row(call.matrix) | {
        "p_weight": weight, "p_bias": bias, "p_y": y, "p_rest": rest, "p_normed": normed, "rows": rows,
        "split": split, "normed": count, "row_programs": row_programs, "eps": eps, **shape,
    }  # fmt: skip
    launch = Launch(row_kernels.gather_forward, x.shape[0] * row_programs, arguments, _warps(width), stages=1)
    return Plan([launch], results)


def plan_backward(
    device: Device,
    call: Mix,
    gradients: Sequence[Tensor | None],
    y: Tensor | None,
    first: int,
    tokens: int,
    wanted: Sequence[bool],
) -> Plan:
    """The gradients of what was mixed, of the matrix, and of weight and bias, as ``wanted`` asks.

    Its results are those of x (B, first, D) and carried; of the matrix, (B, entries) by image where it is sparse, or in
    parts (parts, rows, tokens); and in parts of weight and bias (parts, 2, D), parts in float32; None where there is
    none, or it is not asked for. A dense matrix has been padded.

    ``gradients`` of the results, dy (B, split, D), drest (B, rows - split, D), dnormed (B, normed, D), where normed is
    split or drest is None; of ``tokens`` that were mixed, ``first`` stood in x. What was mixed is read where the
    matrix's gradient is asked for, and by a sparse matrix's norm; a dense one's reads y (B, normed or more, D).
    """
    dy, drest, dnormed = map(addressable, gradients)
    x, update, carried = map(addressable, call[:3])
    batch, _, width = dy.shape
    launches, scratch, partial_daffine = [], [], None
    if dnormed is not None:
        mixed = (x, update, carried) if call.is_sparse() else (y, None, None)
        launch, dmixed, partial_daffine = _norm_backward(device, call, dnormed, dy, mixed, first, wanted[2])
        launches.append(launch)
        scratch.append(dmixed)
        if dnormed.shape[1] < dy.shape[1]:
            drest = dy[:, dnormed.shape[1] :]
        dy = dmixed
    dx = dcarried = partial = None
    if wanted[0]:
        dx = dy.new_empty(batch, first, width)
        dcarried = dy.new_empty(batch, tokens - first, width) if first < tokens else None
    if call.is_sparse():
        if wanted[1]:
            partial = torch.empty(batch, call.matrix.values.shape[-1], dtype=torch.float32, device=dy.device)
        if wanted[0] or wanted[1]:
            state = (None, None, None) if partial is None else (x, update, carried)
            launches.append(_gather_backward(dy, drest, state, call.matrix, first, tokens, dx, dcarried, partial))
        return Plan(launches, (dx, dcarried, partial, partial_daffine), scratch)
    if wanted[0]:
        launches.append(mix_launch(device, call.matrix, dy, drest, dx, dcarried, transposed=True))
    if wanted[1]:
        launch, partial = matrix_gradient_launch(device, dy, drest, x, carried, (call.counts()[0], tokens))
        launches.append(launch)
    return Plan(launches, (dx, dcarried, partial, partial_daffine), scratch)


def _norm_backward(
    device: Device,
    call: Mix,
    dnormed: Tensor,
    dy: Tensor,
    mixed: tuple[Tensor | None, ...],
    first: int,
    affine: bool,
) -> tuple[Launch, Tensor, Tensor | None]:
    """``mixed`` is what a sparse matrix mixes once more, or the mix itself."""
    weight, _, eps = call.norm
    batch, normed, width = dnormed.shape
    matrix = _by_row(call.matrix if call.is_sparse() else SparseRows(None, None, None))
    # As much as stays in registers: of float32, whose loads are wider, 4096 numbers spill on sm_80.
    shape = whole_rows(width, 4096 if dnormed.element_size() == 2 else 3072, *mixed, dnormed, dy)
    row_programs = -(-normed // shape["ROWS"])
    items = batch * row_programs
    programs = min(items, 4 * device.multiprocessors)
    dmixed = dnormed.new_empty(batch, normed, width)
    partial = torch.empty(programs, 2, width, dtype=torch.float32, device=dnormed.device) if affine else None
    arguments = _mixed(*mixed, first) | matrix | {
        "p_weight": weight, "p_dnormed": dnormed, "p_dy": dy, "p_dmixed": dmixed, "p_partial": partial,
        "rows": call.counts()[0], "normed": normed, "row_programs": row_programs, "items": items, "programs": programs,
        **strides("n", dnormed), **strides("y", dy), "eps": eps, **shape,
    }  # fmt: skip
    return Launch(row_kernels.norm_backward, programs, arguments, warps=8, stages=1), dmixed, partial


def _gather_backward(
    dy: Tensor,
    drest: Tensor | None,
    state: tuple[Tensor | None, ...],
    matrix: SparseRows,
    first: int,
    tokens: int,
    dx: Tensor | None,
    dcarried: Tensor | None,
    partial: Tensor | None,
) -> Launch:
    batch, split, width = dy.shape
    by_column = matrix.by_column or ByColumn.of(matrix.starts, matrix.columns, tokens)
    column_starts, rows, entries, values = (x.contiguous() for x in (*by_column, matrix.values))
    if values.numel() >= 2**31:
        column_starts = column_starts.long()  # whose type numbers the entries of all images
    shape = whole_rows(width, 2048 if dy.element_size() == 2 else 512, *state, dy, drest)
    row_programs = -(-tokens // shape["ROWS"])
    arguments = _mixed(*state, first) | {
        "p_dy": dy, "p_drest": drest, "p_starts": column_starts, "p_rows": rows, "p_entries": entries,
        "p_values": values, "p_dx": dx, "p_dcarried": dcarried, "p_partial": partial, "tokens": tokens,
        "entries": values.shape[-1], "by_image": values.dim() - 1, "split": split, "row_programs": row_programs,
        **strides("y", dy), **strides("r", drest), **shape,
    }  # fmt: skip
    return Launch(row_kernels.gather_backward, batch * row_programs, arguments, _warps(width), stages=1)


def mix_launch(
    device: Device,
    matrix: Tensor,
    x: Tensor,
    carried: Tensor | None,
    y: Tensor,
    rest: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float, Tensor] | None = None,
    transposed: bool = False,
) -> Launch:
    """[y; rest] = matrix @ [x; carried], or matrix^T @ ...; matrix padded; ``norm``: weight, bias, eps, result."""
    batch, first, width = x.shape
    rows = y.shape[1] + (0 if rest is None else rest.shape[1])
    block, columns, warps, stages = mix_tiles(device, x, norm is not None)
    row_programs = -(-rows // block)
    width_programs = 1 if norm is not None else -(-width // columns)
    weight, bias, eps, normed = norm or (None, None, 0.0, None)
    arguments = {
        "p_matrix": matrix, "p_x": x, "p_carried": carried, "p_weight": weight, "p_bias": bias, "p_y": y,
        "p_rest": rest, "p_normed": normed, "rows": rows, "chunks": matrix.shape[1] // CHUNK,
        "tokens": first + (0 if carried is None else carried.shape[1]), "first": first,
        "split": y.shape[1], "normed": 0 if normed is None else normed.shape[1], "width": width,
        "row_programs": row_programs, "width_programs": width_programs, "stride_matrix": matrix.stride(0),
        **strides("x", x), **strides("c", carried), **strides("y", y), **strides("r", rest), "eps": eps,
        "TRANSPOSED": transposed, "ROWS": block, "COLUMNS": columns, "CHUNK": CHUNK, "STAGES": stages,
        "ALIGNED": aligned(x, carried, y, rest), "PRECISION": precision(x),
    }  # fmt: skip
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
        "p_dy": dy, "p_drest": drest, "p_x": x, "p_carried": carried, "p_partial": partial, "batch": batch,
        "rows": rows, "tokens": tokens, "split": dy.shape[1], "first": first, "width": width, **strides("y", dy),
        **strides("r", drest), **strides("x", x), **strides("c", carried), "row_programs": row_programs,
        "token_programs": token_programs, "splits": splits, "ROWS": 64, "TOKENS": 64,
        "CHUNK": 64 if x.element_size() == 2 and device.family > 80 else 32, "STAGES": stages,
        "ALIGNED": aligned(dy, drest, x, carried), "PRECISION": precision(x),
    }  # fmt: skip
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


def _mixed(x: Tensor | None, update: Tensor | None, carried: Tensor | None, first: int) -> dict[str, Any]:
    pointers = {"p_x": x, "p_update": update, "p_carried": carried, "first": first}
    return pointers | strides("x", x) | strides("u", update) | strides("c", carried)


def _by_row(matrix: SparseRows) -> dict[str, Any]:
    """A matrix by its rows, or None three times, as the kernels address it."""
    starts, columns, values = (None if x is None else x.contiguous() for x in matrix[:3])
    entries, by_image = (0, 0) if columns is None else (columns.shape[-1], columns.dim() - 1)
    return {"p_starts": starts, "p_columns": columns, "p_values": values, "entries": entries, "by_image": by_image}


def _warps(width: int) -> int:
    """Warps of a program that holds whole rows."""
    return 4 if width <= 2048 else 8


def strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """The strides of a tensor (B, N, ...) as kernels name them, 0 for none."""
    batch, rows = (0, 0) if tensor is None else tensor.stride()[:2]
    return {f"stride_{name}b": batch, f"stride_{name}n": rows}


def addressable(x: Tensor | None) -> Tensor | None:
    """x (B, N, D) as the kernels address it: contiguous rows, and an image's rows within 2^31 elements."""
    if x is None or (x.stride(2) == 1 and x.stride(1) * max(1, x.shape[1] - 1) < 2**31 - x.shape[2]):
        return x
    return x.contiguous()
