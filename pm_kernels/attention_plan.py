"""Which kernels fused_merge_attention launches for given inputs: grids, block sizes, and buffers for the results.

A plan is made from shapes, strides and dtypes alone, so that it can be made, and its kernels compiled, for a device
that is not there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention_backward_kernels as backward_kernels
from . import attention_kernels as kernels
from .attention import Attention
from .mixing_plan import addressable, matrix_gradient_launch, mix_launch
from .runtime import CHUNK, Device, Launch, padded, precision

RESIDENT = 256  # keys, or in the backward queries, that fit on the chip at a head width of 64


class Tiles(NamedTuple):
    """Block sizes of a kernel whose ``pieces`` stay on the chip, in order, while ``step`` rows at a time pass by."""

    pieces: tuple[int, ...]
    step: int
    warps: int
    stages: int
    transposed: bool = False  # the gradients of keys and values are formed as [D, K]


# Backward, by family, for up to 64, 128, 192, 256 queries: what spills no register with Triton 3.6 nor with 3.9, and
# has most programs in flight.
_BACKWARD = {
    80: (
        Tiles((64,), 16, 4, 2, True),
        Tiles((128,), 16, 4, 2, True),
        Tiles((128, 64), 16, 8, 2, True),
        Tiles((256,), 16, 8, 1, True),
    ),
    90: (
        Tiles((64,), 32, 4, 2, True),
        Tiles((128,), 32, 8, 2, True),
        Tiles((128, 64), 16, 8, 1, True),
        Tiles((256,), 32, 8, 1, True),
    ),
    100: (
        Tiles((64,), 32, 4, 2),
        Tiles((128,), 32, 8, 2),
        Tiles((128, 64), 16, 8, 1),
        Tiles((64, 64, 64, 64), 16, 8, 1),
    ),
}
# Backward with the merge inside, for up to 64, 128 queries.
_MERGED_BACKWARD = {
    80: (Tiles((64,), 16, 4, 1, True), Tiles((128,), 16, 8, 1, True)),
    90: (Tiles((64,), 64, 8, 1, True), Tiles((128,), 64, 8, 1, True)),
    100: (Tiles((64,), 64, 8, 1), Tiles((128,), 16, 8, 1, True)),
}


class Backward(NamedTuple):
    """What the backward launches, in order, and the buffers that it fills; None where no gradient is asked for."""

    launches: list[Launch]
    dqkv: Tensor  # (B, tokens, 3, H, d)
    partial_dmerges: list[Tensor]  # each (parts, C, N) float32
    dgate: Tensor | None  # (B, H, keys) float32
    dbias: Tensor | None  # (B, H, keys) float32


def pieces(count: int) -> tuple[int, ...]:
    """Blocks of 64, and a last one of 16, 32 or 64, that cover ``count`` with only the last reaching past it."""
    whole, rest = divmod(count - 1, 64)
    last = next(size for size in (16, 32, 64) if rest < size)
    return (64,) * whole + (last,)


def forward_tiles(device: Device, size: int, columns: int, keys: int, merged: bool) -> Tiles | None:
    """Blocks of keys, rows of queries; None where the keys do not fit on the chip.

    What fits was found by compiling: one block of keys more, and registers spill.
    """
    limit = (RESIDENT if size == 2 else RESIDENT // 2) * 64 // max(64, columns)
    if device.family == 80 and size * columns > 128:
        limit = 64
    if keys > limit:
        return None
    if not merged:
        return Tiles(pieces(keys), 64, 4, 1)
    if columns > 64 or size == 4:
        return Tiles((64,), 64, 4, 1) if keys <= 64 and columns <= 64 and device.family > 80 else None
    if 64 < keys <= 128:
        return Tiles((128,), 128, 8, 1)
    blocks = max(1, -(-keys // 64))
    if device.family == 80 and blocks > (3 if columns == 64 else 2):
        return None
    if device.family == 80:
        return Tiles((64,), 64, 4, 2) if blocks == 1 else Tiles((64,) * blocks, 32, 4, 1)
    return Tiles((64,) * blocks, 64, 4, 1)


def backward_tiles(device: Device, size: int, columns: int, queries: int, merged: bool, plain: bool) -> Tiles | None:
    """Blocks of queries, step of keys; None where the queries do not fit on the chip."""
    # From 192 queries on, programs take 106 to 168 KiB of shared memory, which consumer devices do not have.
    limit = RESIDENT if columns == 64 and not merged and device.shared >= 160 * 1024 else RESIDENT // 2
    if columns > 64 or size == 4 or queries > limit:
        return None
    index = max(0, queries - 1) // 64
    if columns < 64 and not merged:
        # A step of 64 keys fills the matrix unit's rows, which a narrow head does not.
        return Tiles((64 << index,), 64, 4 << index, 2, device.family == 100)
    if merged:
        return _MERGED_BACKWARD[device.family][index]
    if index == 2 and not plain and device.family < 100:
        index = 3  # gate or bias take the registers that two pieces need
    return _BACKWARD[device.family][index]


def streaming_tiles(device: Device, size: int, columns: int) -> tuple[int, int]:
    """Rows of queries and step of keys, for heads of so many columns of so many bytes."""
    if size * columns > 256 or (device.family == 80 and size * columns == 256 and size == 4):
        return 64, 16
    if columns < 64:
        return 64, 32 if size == 2 else 64
    return (128, 64) if size * columns == 128 else (64, 32)


def streaming_backward_tiles(device: Device, size: int, columns: int) -> tuple[int, int, int]:
    """Rows of queries, the step of either pass, and rows of keys, for heads of so many columns of so many bytes."""
    if size * columns > 256:
        return 64, 16, 32
    if device.family == 80:
        return 64, 32, 64 if size == 2 and columns <= 64 else 32
    return 64, 64 if size * columns <= 128 else 32, 64


def plan_forward(device: Device, call: Attention, out: Tensor, lse: Tensor) -> list[Launch]:
    """What the forward launches, in order, to fill ``out`` and ``lse``; the merge matrix may be padded."""
    q, k, v = map(_addressable, call.heads())
    merge, merge_queries = call.merge, call.merge_queries
    batch, heads, width, _, tokens, queries, keys = call.sizes()
    columns, size = _columns(width), _element_size(device, q)
    launches = []
    tiles = forward_tiles(device, size, columns, keys, merge is not None)
    if merge is not None and tiles is None:
        launches, (q, k, v) = _merged(device, q, k, v, merge, merge_queries)
        merge, tiles = None, forward_tiles(device, size, columns, keys, False)
    arguments = _arguments(call, q, k, v) | {"p_out": out, "p_lse": lse}
    if tiles is None:
        rows, step = streaming_tiles(device, size, columns)
        programs = -(-queries // rows)
        arguments |= {"programs": programs, "ROWS": rows, "STEP": step}
        launch = Launch(kernels.forward_streaming, batch * heads * programs, arguments, warps=rows // 16, stages=2)
        return [*launches, launch]
    blocks = -(-queries // tiles.step)
    # A head's keys and values are loaded once for all its queries where there are heads enough to fill the device.
    per_program = max(1, blocks) if batch * heads >= 2 * device.multiprocessors else 1
    programs = -(-blocks // per_program)
    arguments |= _merge_arguments(merge, tokens) | {
        "programs": programs,
        "tiles": per_program,
        "MERGE_QUERIES": merge_queries,
        "PIECES": tiles.pieces,
        "ROWS": tiles.step,
        "STAGES": tiles.stages,
    }
    launch = Launch(kernels.forward_resident, batch * heads * programs, arguments, warps=tiles.warps, stages=1)
    return [*launches, launch]


def plan_backward(
    device: Device, call: Attention, dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool]
) -> Backward:
    """``wanted``: whether the gradients of merge, gate and key_bias are asked for."""
    q, k, v = map(_addressable, call.heads())
    dout = _addressable(dout)
    merge, merge_queries = call.merge, call.merge_queries
    batch, heads, width, rows, tokens, queries, keys = call.sizes()
    columns, size = _columns(width), _element_size(device, q)
    dgate, dbias = (lse.new_empty(batch, heads, keys) if want else None for want in wanted[1:])
    # Where a tensor has fewer tokens than another, its gradient's last rows are nobody's, and are left 0.
    allocate = q.new_empty if rows == tokens else q.new_zeros
    dqkv = allocate(batch, max(rows, tokens), 3, heads, width)
    plain = call.gate is None and call.key_bias is None
    fused = merge is not None and merge_queries
    tiles = backward_tiles(device, size, columns, queries, fused, plain)
    launches, inputs, merged_gradient = [], (q, k, v), dqkv
    if merge is not None:
        merged_gradient = q.new_empty(batch, keys, 3, heads, width)
        if tiles is None or not fused:
            launches, inputs = _merged(device, q, k, v, merge, merge_queries)
            fused, tiles = False, backward_tiles(device, size, columns, queries, False, plain)
    dq = (merged_gradient if merge is not None and merge_queries else dqkv)[:, :, 0]
    dk, dv = merged_gradient[:, :, 1], merged_gradient[:, :, 2]
    shared = _arguments(call, *inputs) | {
        "p_dout": dout,
        "p_lse": lse,
        "stride_doutb": dout.stride(0),
        "stride_douth": dout.stride(1),
        "DOUT_STRIDE": dout.stride(2),
    }
    of_queries = {"p_out": out, "p_dq": dq, "stride_dqb": dq.stride(0)}
    of_keys = {"p_dk": dk, "p_dv": dv, "p_dgate": dgate, "p_dbias": dbias, "stride_dkb": dk.stride(0)}
    if tiles is not None:
        arguments = shared | of_queries | of_keys | _merge_arguments(merge if fused else None, tokens)
        arguments |= {
            "MERGE_QUERIES": merge_queries,
            "PIECES": tiles.pieces,
            "STEP": tiles.step,
            "STAGES": tiles.stages,
            "TRANSPOSED": tiles.transposed,
        }
        launches.append(Launch(backward_kernels.backward_resident, batch * heads, arguments, tiles.warps, tiles.stages))
    else:
        launches += _streaming_backward(device, call, shared, of_queries, of_keys)
    partials = []
    if merge is not None:
        launches.append(_unmerge(device, call, merged_gradient, dqkv))
        for index in range(0 if merge_queries else 1, 3) if wanted[0] else ():
            gradient = merged_gradient[:, :, index].flatten(2)
            x = _flat_heads((q, k, v)[index])
            launch, partial = matrix_gradient_launch(device, gradient, None, x, None, merge.shape)
            launches.append(launch)
            partials.append(partial)
    return Backward(launches, dqkv, partials, dgate, dbias)


def _streaming_backward(device: Device, call: Attention, shared: dict, of_queries: dict, of_keys: dict) -> list[Launch]:
    """Two passes, with the arguments of both, of the queries' and of the keys'."""
    batch, heads, width, _, _, queries, keys = call.sizes()
    rows, step, block = streaming_backward_tiles(device, _element_size(device, call.q), _columns(width))
    shared |= {"p_delta": torch.empty_like(shared["p_lse"]), "STEP": step}
    passes = (
        (backward_kernels.backward_queries, of_queries, "ROWS", rows, queries),
        (backward_kernels.backward_keys, of_keys, "KEYS", block, keys),
    )
    launches = []
    for kernel, own, name, size, count in passes:
        programs = -(-count // size)
        arguments = shared | own | {"programs": programs, name: size}
        launches.append(Launch(kernel, batch * heads * programs, arguments, warps=4, stages=2))
    return launches


def _unmerge(device: Device, call: Attention, merged: Tensor, dqkv: Tensor) -> Launch:
    """Take the gradient of what was merged back to all tokens."""
    batch, heads, width, _, tokens, _, _ = call.sizes()
    first = 0 if call.merge_queries else 1
    target = dqkv[:, :tokens, first:].view(batch, tokens, (3 - first) * heads * width)
    return mix_launch(device, padded(call.merge), merged[:, :, first:].flatten(2), None, target, transposed=True)


def _arguments(call: Attention, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What all kernels take; q, k, v may be merged already."""
    batch, heads, width, _, _, queries, keys = call.sizes()
    gate, gate_per_head = _per_key(call.gate, batch, heads, keys)
    key_bias, bias_per_head = _per_key(call.key_bias, batch, heads, keys)
    arguments = {
        "p_gate": gate, "p_bias": key_bias, "queries": queries, "keys": keys,
        "scale": width**-0.5 if call.scale is None else call.scale, "HEADS": heads, "WIDTH": width,
        "COLUMNS": _columns(width), "GATE_PER_HEAD": gate_per_head, "BIAS_PER_HEAD": bias_per_head,
        "PRECISION": precision(q),
    }  # fmt: skip
    for name, x in zip("qkv", (q, k, v), strict=True):
        arguments |= {
            f"p_{name}": x,
            f"stride_{name}b": x.stride(0),
            f"stride_{name}h": x.stride(1),
            f"{name.upper()}_STRIDE": x.stride(2),
        }
    return arguments


def _merge_arguments(merge: Tensor | None, tokens: int) -> dict[str, Any]:
    matrix = None if merge is None else padded(merge)
    stride = 0 if matrix is None else matrix.stride(0)
    return {"p_merge": matrix, "tokens": tokens, "stride_merge": stride, "CHUNK": CHUNK}


def _merged(
    device: Device, q: Tensor, k: Tensor, v: Tensor, merge: Tensor, merge_queries: bool
) -> tuple[list[Launch], list[Tensor]]:
    """Launches that merge q, k, v in memory, and the merged ones: for sequences too long to merge on the chip."""
    batch, heads, _, width = q.shape
    matrix = padded(merge)
    buffer = q.new_empty(batch, len(merge), 3, heads, width)
    launches, merged = [], [q, k, v]
    for index in range(0 if merge_queries else 1, 3):
        target = buffer[:, :, index]
        rows = target.view(batch, len(merge), heads * width)
        launches.append(mix_launch(device, matrix, _flat_heads(merged[index]), None, rows))
        merged[index] = target.transpose(1, 2)
    return launches, merged


def _addressable(x: Tensor) -> Tensor:
    """x (B, H, N, d) as the kernels address it: contiguous rows, and a head's rows within 2^31 elements."""
    if x.stride(3) == 1 and x.stride(2) * max(1, x.shape[2] - 1) < 2**31 - x.shape[3]:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _flat_heads(x: Tensor) -> Tensor:
    """x (B, H, N, d) as (B, N, H * d): a view where heads lie side by side, as in a packed projection.

    Heads of width 1 make a view of any layout.
    """
    return addressable(x.transpose(1, 2).flatten(2))


def _per_key(values: Tensor | None, batch: int, heads: int, keys: int) -> tuple[Tensor | None, bool]:
    """Gate or bias as (keys,), or as (B, H, keys) and True where it differs between images or heads."""
    if values is None:
        return None, False
    if values.dtype == torch.float64:
        values = values.float()
    if values.shape == (keys,) and values.is_contiguous():
        return values, False
    if values.numel() == values.shape[-1]:
        return values.reshape(-1).expand(keys).contiguous(), False
    if values.shape != (batch, heads, keys):
        values = values.expand(batch, heads, keys)
    return values if values.is_contiguous() else values.contiguous(), True


def _columns(width: int) -> int:
    """The power of two that holds a head, as wide as a matrix unit takes at least."""
    return max(16, 1 << (width - 1).bit_length())


def _element_size(device: Device, q: Tensor) -> int:
    return 2 if device.interpreter else q.element_size()
