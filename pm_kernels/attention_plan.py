"""Which kernels fused_merge_attention launches for given inputs: grids, block sizes, and buffers for the results.

A plan is made from shapes, strides and dtypes alone, so that it can be made, and its kernels compiled, for a device
that is not there.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention_backward_kernels as backward_kernels
from . import attention_kernels as kernels
from .attention import Attention
from .launches import Launch, Plan
from .mixing_plan import addressable, matrix_gradient_launch, mix_launch
from .runtime import CHUNK, Device, precision

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


def plan_forward(device: Device, call: Attention) -> Plan:
    """What the forward launches to fill the output and lse; the merge matrix has been padded."""
    out, lse = results = call.results()
    q, k, v = map(_addressable, call.heads())
    merge, merge_queries = call.merge, call.merge_queries
    batch, heads, width, _, tokens, queries, keys = call.sizes()
    columns, size = _columns(width), _element_size(device, q)
    launches, scratch = [], []
    tiles = forward_tiles(device, size, columns, keys, merge is not None)
    if merge is not None and tiles is None:
        launches, (q, k, v), scratch = _merged(device, q, k, v, merge, merge_queries)
        merge, tiles = None, forward_tiles(device, size, columns, keys, False)
    arguments = _arguments(call, q, k, v) | {"p_out": out, "p_lse": lse}
    if tiles is None:
        rows, step = streaming_tiles(device, size, columns)
        programs = -(-queries // rows)
        arguments |= {"programs": programs, "ROWS": rows, "STEP": step}
        launch = Launch(kernels.forward_streaming, batch * heads * programs, arguments, warps=rows // 16, stages=2)
        return Plan([*launches, launch], results, scratch)
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
    return Plan([*launches, launch], results, scratch)


def plan_backward(
    device: Device, call: Attention, dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool]
) -> Plan:
    """What the backward launches; ``wanted``: whether the gradients of merge, gate and key_bias are asked for.

    Its results are the gradients of q, k, v, packed (B, tokens, 3, H, d); of gate and key_bias (B, H, keys) in float32,
    or None; and of merge, which has been padded, any number of tensors (parts, C, N) of float32 to be summed.
    """
    q, k, v = map(_addressable, call.heads())
    dout = _addressable(dout)
    merge, merge_queries = call.merge, call.merge_queries
    batch, heads, width, rows, tokens, queries, keys = call.sizes()
    columns, size = _columns(width), _element_size(device, q)
    dgate, dbias = (lse.new_empty(batch, heads, keys) if want else None for want in wanted[1:])
    dqkv = q.new_empty(batch, max(rows, tokens), 3, heads, width)
    plain = call.gate is None and call.key_bias is None
    fused = merge is not None and merge_queries
    tiles = backward_tiles(device, size, columns, queries, fused, plain)
    launches, inputs, merged_gradient, scratch = [], (q, k, v), dqkv, []
    if merge is not None:
        if tiles is None or not fused:
            launches, inputs, scratch = _merged(device, q, k, v, merge, merge_queries)
            fused, tiles = False, backward_tiles(device, size, columns, queries, False, plain)
        merged_gradient = q.new_empty(batch, keys, 3, heads, width)
        scratch.append(merged_gradient)
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
        delta = torch.empty_like(lse)
        scratch.append(delta)
        launches += _streaming_backward(device, call, shared | {"p_delta": delta}, of_queries, of_keys)
    partials = []
    if merge is not None:
        launches.append(_unmerge(device, call, merged_gradient, dqkv))
        for index in range(0 if merge_queries else 1, 3) if wanted[0] else ():
            gradient = merged_gradient[:, :, index].flatten(2)
            x = _flat_heads((q, k, v)[index])
            launch, partial = matrix_gradient_launch(device, gradient, None, x, None, (keys, tokens))
            launches.append(launch)
            partials.append(partial)
    return Plan(launches, (dqkv, dgate, dbias, *partials), scratch)


def _streaming_backward(device: Device, call: Attention, shared: dict, of_queries: dict, of_keys: dict) -> list[Launch]:
    """Two passes, with the arguments of both, of the queries' and of the keys'."""
    batch, heads, width, _, _, queries, keys = call.sizes()
    rows, step, block = streaming_backward_tiles(device, _element_size(device, call.q), _columns(width))
    shared |= {"STEP": step}
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
    return mix_launch(device, call.merge, merged[:, :, first:].flatten(2), None, target, transposed=True)


def _arguments(call: Attention, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What all kernels take; q, k, v may be merged already."""
    batch, heads, width, _, _, queries, keys = call.sizes()
    gate, gate_heads = _per_key(call.gate, batch, heads, keys)
    key_bias, bias_heads = _per_key(call.key_bias, batch, heads, keys)
    arguments = {
        "p_gate": gate, "p_bias": key_bias, "queries": queries, "keys": keys,
        "scale": width**-0.5 if call.scale is None else call.scale, "HEADS": heads, "WIDTH": width,
        "COLUMNS": _columns(width), "GATE_HEADS": gate_heads, "BIAS_HEADS": bias_heads,
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
    stride = 0 if merge is None else merge.stride(0)
    return {"p_merge": merge, "tokens": tokens, "stride_merge": stride, "CHUNK": CHUNK}


def _merged(
    device: Device, q: Tensor, k: Tensor, v: Tensor, merge: Tensor, merge_queries: bool
) -> tuple[list[Launch], list[Tensor], list[Tensor]]:
    """Launches that merge q, k, v in memory, as sequences too long for the chip are; the merged ones; their memory."""
    batch, heads, _, width = q.shape
    buffer = q.new_empty(batch, len(merge), 3, heads, width)
    launches, merged = [], [q, k, v]
    for index in range(0 if merge_queries else 1, 3):
        target = buffer[:, :, index]
        rows = target.view(batch, len(merge), heads * width)
        launches.append(mix_launch(device, merge, _flat_heads(merged[index]), None, rows))
        merged[index] = target.transpose(1, 2)
    return launches, merged, [buffer]


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


def _per_key(values: Tensor | None, batch: int, heads: int, keys: int) -> tuple[Tensor | None, int]:
    """Gate or bias as rows of keys, one after another, and how many heads share a row: all images' where 0."""
    if values is None:
        return None, 0
    if values.dtype == torch.float64:
        values = values.float()
    if math.prod(values.shape[:-1]) == 1:
        return values.expand(*values.shape[:-1], keys).contiguous(), 0
    shared = values.dim() == 3 and values.shape[:2] == (batch, 1)
    return values.expand(batch, 1 if shared else heads, keys).contiguous(), heads if shared else 1


def _columns(width: int) -> int:
    """The power of two that holds a head, as wide as a matrix unit takes at least."""
    return max(16, 1 << (width - 1).bit_length())


def _element_size(device: Device, q: Tensor) -> int:
    return 2 if device.interpreter else q.element_size()
