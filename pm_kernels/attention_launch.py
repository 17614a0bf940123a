"""Which kernels fused_merge_attention launches for given inputs: grids, block sizes, and buffers for the results.

A plan is made from shapes, strides and dtypes alone, so that it can be made, and its kernels compiled, for a device
that is not there.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention_kernels as kernels
from .launch import Device, Launch, Repeats, layout
from .sparse import CHUNK
from .token_mix_launch import addressable, matrix_gradient_launch, mix_launch, padded, precision

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


class Forward(NamedTuple):
    """What the forward launches, in order, and the buffers that it fills."""

    launches: list[Launch]
    out: Tensor  # (B, H, queries, d), in memory (B, queries, H, d)
    lse: Tensor  # (B, H, queries) float32, base 2


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


def plan_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
) -> Forward:
    """Shapes as in :func:`pm_kernels.fused_merge_attention`; merge may have zeros after its last column."""
    batch, heads, _, width = q.shape
    q, k, v = map(_addressable, (q, k, v))
    columns = max(16, _power_of_two(width))
    size = 2 if device.interpreter else q.element_size()
    launches = []
    keys = k.shape[2] if merge is None else merge.shape[0]
    queries = merge.shape[0] if merge is not None and merge_queries else q.shape[2]
    tiles = forward_tiles(device, size, columns, keys, merge is not None)
    if merge is not None and tiles is None:
        merging, (q, k, v) = _merged(device, q, k, v, merge, merge_queries)
        launches += merging
        merge, tiles = None, forward_tiles(device, size, columns, keys, False)
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    shared = _attention_arguments(q, k, v, gate, key_bias, keys) | {
        "p_out": out,
        "p_lse": lse,
        "queries": queries,
        "scale": scale,
        "COLUMNS": columns,
        "PRECISION": precision(q),
    }
    if tiles is None:
        rows, step = streaming_tiles(device, size, columns)
        programs = -(-queries // rows)
        launches.append(
            Launch(
                kernels.forward_streaming,
                batch * heads * programs,
                shared | {"programs": programs, "ROWS": rows, "STEP": step},
                warps=rows // 16,
                stages=2,
            )
        )
        return Forward(launches, out, lse)
    blocks = -(-queries // tiles.step)
    # A head's keys and values are loaded once for all its queries where there are heads enough to fill the device.
    per_program = max(1, blocks) if batch * heads >= 2 * device.multiprocessors else 1
    programs = -(-blocks // per_program)
    launches.append(
        Launch(
            kernels.forward_resident,
            batch * heads * programs,
            shared
            | _merge_arguments(merge, k.shape[2])
            | {
                "programs": programs,
                "tiles": per_program,
                "MERGE_QUERIES": merge_queries,
                "PIECES": tiles.pieces,
                "ROWS": tiles.step,
                "STAGES": tiles.stages,
            },
            warps=tiles.warps,
            stages=1,
        )
    )
    return Forward(launches, out, lse)


_FORWARD_TENSORS = ("p_q", "p_k", "p_v", "p_merge", "p_gate", "p_bias", "p_out", "p_lse")
_repeats = Repeats(_FORWARD_TENSORS)


def run_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Plan the forward and run it: the output and lse. A call like one before takes up what that one prepared."""
    merge = None if merge is None else padded(merge)
    inputs = (q, k, v, merge, gate, key_bias)
    key = (device, q.device, scale, merge_queries, precision(q), *map(layout, inputs))
    known = _repeats.find(key)
    if known is not None:
        prepared, (batch, heads, queries, width) = known
        out = torch.empty((batch, queries, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)
        lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
        prepared.run((*inputs, out, lse))
        return out, lse
    plan = plan_forward(device, q, k, v, merge, gate, key_bias, scale, merge_queries)
    _repeats.run(key, device, plan.launches, inputs, tuple(plan.out.shape))
    return plan.out, plan.lse


def plan_backward(
    device: Device,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    merge: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    merge_queries: bool,
    wanted: tuple[bool, bool, bool],
) -> Backward:
    """Shapes as in :func:`pm_kernels.fused_merge_attention`; ``wanted``: gradients of merge, gate, key_bias."""
    batch, heads, _, width = q.shape
    q, k, v, dout = map(_addressable, (q, k, v, dout))
    columns = max(16, _power_of_two(width))
    size = 2 if device.interpreter else q.element_size()
    tokens, queries = k.shape[2], lse.shape[2]
    keys = tokens if merge is None else merge.shape[0]
    like = {"dtype": torch.float32, "device": q.device}
    dgate = torch.empty(batch, heads, keys, **like) if wanted[1] else None
    dbias = torch.empty(batch, heads, keys, **like) if wanted[2] else None
    # Where a tensor has fewer tokens than another, its gradient's last rows are nobody's, and are left 0.
    allocate = torch.empty if q.shape[2] == tokens else torch.zeros
    dqkv = allocate(batch, max(q.shape[2], tokens), 3, heads, width, dtype=q.dtype, device=q.device)
    plain = gate is None and key_bias is None
    fused = merge is not None and merge_queries
    tiles = backward_tiles(device, size, columns, queries, fused, plain)
    launches = []
    inputs, merged_gradient = (q, k, v), dqkv
    if merge is not None:
        merged_gradient = torch.empty(batch, keys, 3, heads, width, dtype=q.dtype, device=q.device)
        if tiles is None or not fused:
            launches, inputs = _merged(device, q, k, v, merge, merge_queries)
            fused, tiles = False, backward_tiles(device, size, columns, queries, False, plain)
    dq = (merged_gradient if merge is not None and merge_queries else dqkv)[:, :, 0]
    dk, dv = merged_gradient[:, :, 1], merged_gradient[:, :, 2]
    shared = _attention_arguments(*inputs, gate, key_bias, keys) | {
        "p_dout": dout,
        "p_lse": lse,
        "queries": queries,
        "stride_doutb": dout.stride(0),
        "stride_douth": dout.stride(1),
        "DOUT_STRIDE": dout.stride(2),
        "scale": scale,
        "COLUMNS": columns,
        "PRECISION": precision(q),
    }
    of_queries = {"p_out": out, "p_dq": dq, "stride_dqb": dq.stride(0)}
    of_keys = {"p_dk": dk, "p_dv": dv, "p_dgate": dgate, "p_dbias": dbias, "stride_dkb": dk.stride(0)}
    if tiles is not None:
        launches.append(
            Launch(
                kernels.backward_resident,
                batch * heads,
                shared
                | of_queries
                | of_keys
                | _merge_arguments(merge if fused else None, tokens)
                | {
                    "MERGE_QUERIES": merge_queries,
                    "PIECES": tiles.pieces,
                    "STEP": tiles.step,
                    "STAGES": tiles.stages,
                    "TRANSPOSED": tiles.transposed,
                },
                warps=tiles.warps,
                stages=tiles.stages,
            )
        )
    else:
        delta = torch.empty_like(lse)
        rows, step, block = streaming_backward_tiles(device, size, columns)
        query_programs, key_programs = -(-queries // rows), -(-keys // block)
        launches.append(
            Launch(
                kernels.backward_queries,
                batch * heads * query_programs,
                shared | of_queries | {"p_delta": delta, "programs": query_programs, "ROWS": rows, "STEP": step},
                warps=4,
                stages=2,
            )
        )
        launches.append(
            Launch(
                kernels.backward_keys,
                batch * heads * key_programs,
                shared | of_keys | {"p_delta": delta, "programs": key_programs, "KEYS": block, "STEP": step},
                warps=4,
                stages=2,
            )
        )
    partials = []
    if merge is not None:
        first = 0 if merge_queries else 1
        source = merged_gradient[:, :, first:].flatten(2)
        target = dqkv[:, :tokens, first:].view(batch, tokens, (3 - first) * heads * width)
        launches.append(mix_launch(device, padded(merge), source, None, target, transposed=True))
        for index, x in enumerate((q, k, v)):
            if wanted[0] and index >= first:
                gradient = merged_gradient[:, :, index].flatten(2)
                launch, partial = matrix_gradient_launch(device, gradient, None, _flat_heads(x), None, merge.shape)
                launches.append(launch)
                partials.append(partial)
    return Backward(launches, dqkv, partials, dgate, dbias)


def _attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, key_bias: Tensor | None, keys: int
) -> dict[str, Any]:
    batch, heads, _, width = q.shape
    gate, gate_per_head = _per_key(gate, batch, heads, keys)
    key_bias, bias_per_head = _per_key(key_bias, batch, heads, keys)
    return {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_gate": gate,
        "p_bias": key_bias,
        "keys": keys,
        "stride_qb": q.stride(0),
        "stride_qh": q.stride(1),
        "stride_kb": k.stride(0),
        "stride_kh": k.stride(1),
        "stride_vb": v.stride(0),
        "stride_vh": v.stride(1),
        "HEADS": heads,
        "WIDTH": width,
        "Q_STRIDE": q.stride(2),
        "K_STRIDE": k.stride(2),
        "V_STRIDE": v.stride(2),
        "GATE_PER_HEAD": gate_per_head,
        "BIAS_PER_HEAD": bias_per_head,
    }


def _merge_arguments(merge: Tensor | None, tokens: int) -> dict[str, Any]:
    matrix = None if merge is None else padded(merge)
    return {
        "p_merge": matrix,
        "tokens": tokens,
        "stride_merge": 0 if matrix is None else matrix.stride(0),
        "CHUNK": CHUNK,
    }


def _merged(
    device: Device, q: Tensor, k: Tensor, v: Tensor, merge: Tensor, merge_queries: bool
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """Launches that merge q, k, v in memory, and the merged ones: for sequences too long to merge on the chip."""
    batch, heads, _, width = q.shape
    matrix = padded(merge)
    buffer = torch.empty(batch, len(merge), 3, heads, width, dtype=q.dtype, device=q.device)
    launches, merged = [], []
    for index, x in enumerate((q, k, v)):
        if index == 0 and not merge_queries:
            merged.append(q)
            continue
        target = buffer[:, :, index]
        target_rows = target.view(batch, len(merge), heads * width)
        launches.append(mix_launch(device, matrix, _flat_heads(x), None, target_rows))
        merged.append(target.transpose(1, 2))
    return launches, tuple(merged)


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


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
