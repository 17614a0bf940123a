"""The Triton kernels of the attention's backward. Names and the base of logits as in the forward's module."""

import triton
import triton.language as tl

from .attention_kernels import COUNTS, LOG2_E, load_bias, load_gate, load_rows, store_columns, store_rows, take_rows
from .mixing_kernels import zeros


@triton.jit
def load_queries(
    p_q, p_merge, p_out, p_dout, p_lse, queries, tokens, stride_merge,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, Q_STRIDE: tl.constexpr, DOUT_STRIDE: tl.constexpr,
    MERGE_QUERIES: tl.constexpr, PIECES: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What stays on the chip of a head's queries, a block for each of PIECES: q, dout, zeros for dq, lse, delta."""
    b_qs = ()  # one [PIECE, COLUMNS] for each of PIECES, as are b_douts and b_dqs
    b_douts = ()
    b_dqs = ()
    b_lses = ()  # one [PIECE] for each of PIECES, as is b_deltas
    b_deltas = ()
    start = 0
    for i in tl.static_range(len(PIECES)):
        o_q = start + tl.arange(0, PIECES[i])
        b_q = take_rows(
            p_merge, p_q, o_q, queries, tokens, stride_merge, Q_STRIDE, WIDTH, COLUMNS, CHUNK, STAGES, PRECISION,
            p_merge is not None and MERGE_QUERIES, i + 1 < len(PIECES),
        )  # fmt: skip
        b_out = load_rows(p_out, o_q, queries, HEADS * WIDTH, WIDTH, COLUMNS, i + 1 < len(PIECES))
        b_dout = load_rows(p_dout, o_q, queries, DOUT_STRIDE, WIDTH, COLUMNS, i + 1 < len(PIECES))
        b_qs += (b_q,)
        b_douts += (b_dout,)
        b_dqs += (zeros(PIECES[i], COLUMNS),)
        b_lses += (tl.load(p_lse + o_q, mask=o_q < queries, other=float("inf")),)
        b_deltas += (tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1),)
        start += PIECES[i]
    return b_qs, b_douts, b_dqs, b_lses, b_deltas


@triton.jit
def backward_tile(
    b_qs, b_douts, b_dqs, b_lses, b_deltas, p_q, p_k, p_v, p_merge, p_gate, p_bias, p_dout, p_dk, p_dv, p_dgate,
    p_dbias, i_head, o_k, keys, tokens, stride_merge, scale,
    GRADIENT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GATE_HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr, PIECES: tl.constexpr, STEP: tl.constexpr,
    CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys ``o_k`` [STEP] of a head: writes their gradients, and returns what dq is with them."""
    base2 = scale * LOG2_E
    b_k = take_rows(
        p_merge, p_k, o_k, keys, tokens, stride_merge, K_STRIDE, WIDTH, COLUMNS, CHUNK, STAGES, PRECISION,
        p_merge is not None, False,
    )  # fmt: skip
    b_v = take_rows(
        p_merge, p_v, o_k, keys, tokens, stride_merge, V_STRIDE, WIDTH, COLUMNS, CHUNK, STAGES, PRECISION,
        p_merge is not None, False,
    )  # fmt: skip
    b_bias = load_bias(p_bias, i_head, o_k, keys, BIAS_HEADS, False)
    b_dgate = tl.zeros([STEP], tl.float32)
    b_dbias = tl.zeros([STEP], tl.float32)
    if TRANSPOSED:
        b_dk = tl.zeros([COLUMNS, STEP], tl.float32)
        b_dv = tl.zeros([COLUMNS, STEP], tl.float32)
    else:
        b_dk = tl.zeros([STEP, COLUMNS], tl.float32)
        b_dv = tl.zeros([STEP, COLUMNS], tl.float32)
    if p_gate is not None:
        b_gate = load_gate(p_gate, i_head, o_k, keys, GATE_HEADS, False)
    b_summed_dqs = ()
    for i in tl.static_range(len(PIECES)):
        # ds is finished before any product accumulates: fewer registers are live.
        b_s = tl.dot(b_qs[i], tl.trans(b_k), input_precision=PRECISION) * base2 + b_bias[None, :]  # [PIECE, STEP]
        b_p = tl.exp2(b_s - b_lses[i][:, None])
        b_dp = tl.dot(b_douts[i], tl.trans(b_v), input_precision=PRECISION)
        if p_dgate is not None:
            b_dgate += tl.sum(b_p * b_dp, 0)
        if p_gate is not None:
            b_dp *= b_gate[None, :]
        b_ds = b_p * (b_dp - b_deltas[i][:, None])
        if p_dbias is not None:
            b_dbias += tl.sum(b_ds, 0)
        b_p = b_p.to(p_dout.dtype.element_ty)
        b_ds = b_ds.to(p_q.dtype.element_ty)
        if TRANSPOSED:
            b_dv = tl.dot(tl.trans(b_douts[i]), b_p, b_dv, input_precision=PRECISION)
            b_dk = tl.dot(tl.trans(b_qs[i]), b_ds, b_dk, input_precision=PRECISION)
        else:
            b_dv = tl.dot(tl.trans(b_p), b_douts[i], b_dv, input_precision=PRECISION)
            b_dk = tl.dot(tl.trans(b_ds), b_qs[i], b_dk, input_precision=PRECISION)
        b_summed_dqs += (tl.dot(b_ds, b_k, b_dqs[i], input_precision=PRECISION),)
    if TRANSPOSED:
        if p_gate is not None:
            b_dv *= b_gate[None, :]
        store_columns(p_dv, b_dv, o_k, keys, GRADIENT, WIDTH, COLUMNS)
        store_columns(p_dk, b_dk * scale, o_k, keys, GRADIENT, WIDTH, COLUMNS)
    else:
        if p_gate is not None:
            b_dv *= b_gate[:, None]
        store_rows(p_dv, b_dv, o_k, keys, GRADIENT, WIDTH, COLUMNS)
        store_rows(p_dk, b_dk * scale, o_k, keys, GRADIENT, WIDTH, COLUMNS)
    if p_dgate is not None:
        tl.store(p_dgate + i_head * keys + o_k, b_dgate, mask=o_k < keys)
    if p_dbias is not None:
        tl.store(p_dbias + i_head * keys + o_k, b_dbias, mask=o_k < keys)
    return b_summed_dqs


@triton.jit(do_not_specialize=COUNTS)
def backward_resident(
    p_q, p_k, p_v, p_merge, p_gate, p_bias, p_out, p_dout, p_lse, p_dq, p_dk, p_dv, p_dgate, p_dbias,
    queries, keys, tokens, stride_merge, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_doutb, stride_douth, stride_dqb, stride_dkb, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, DOUT_STRIDE: tl.constexpr,
    GATE_HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr, MERGE_QUERIES: tl.constexpr,
    PIECES: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of attention in one pass, for few queries: they stay on the chip while the keys pass by.

    p_q, p_k, p_v, p_merge, p_gate, p_bias: as in forward_resident; p_out (B, queries, H, WIDTH)
    p_dout (B, H, queries, WIDTH), a token every DOUT_STRIDE; p_lse (B, H, queries) float32
    p_dq, p_dk, p_dv: gradients of the merged q, k, v, (B, rows, 3, H, WIDTH) each from its own third on,
    with p_dk and p_dv in one buffer; p_dgate, p_dbias (B, H, keys) float32 or None

    PIECES are the blocks of queries, in order; only the last reaches past the last query. The gradient of the gate is
    the column sum of attention * (dout v^T), which is here before dv is. TRANSPOSED forms dk and dv as [D, K], where
    the matrix unit's 64 rows are the head's width, so that STEP may be small.
    """
    # This program computes every gradient of one head.
    i_head = tl.program_id(0).to(tl.int64)
    i_b = i_head // HEADS
    i_h = i_head % HEADS
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_out += (i_b * queries * HEADS + i_h) * WIDTH
    p_dout += i_b * stride_doutb + i_h * stride_douth
    p_lse += i_head * queries
    p_dq += i_b * stride_dqb + i_h * WIDTH
    p_dk += i_b * stride_dkb + i_h * WIDTH
    p_dv += i_b * stride_dkb + i_h * WIDTH
    GRADIENT: tl.constexpr = 3 * HEADS * WIDTH  # the stride of tokens in p_dq, p_dk, p_dv

    b_qs, b_douts, b_dqs, b_lses, b_deltas = load_queries(
        p_q, p_merge, p_out, p_dout, p_lse, queries, tokens, stride_merge, HEADS, WIDTH, COLUMNS, Q_STRIDE, DOUT_STRIDE,
        MERGE_QUERIES, PIECES, CHUNK, STAGES, PRECISION,
    )  # fmt: skip
    for key in tl.range(0, keys, STEP, num_stages=STAGES):
        b_dqs = backward_tile(
            b_qs, b_douts, b_dqs, b_lses, b_deltas, p_q, p_k, p_v, p_merge, p_gate, p_bias, p_dout, p_dk, p_dv, p_dgate,
            p_dbias, i_head, key + tl.arange(0, STEP), keys, tokens, stride_merge, scale, GRADIENT, WIDTH, COLUMNS,
            K_STRIDE, V_STRIDE, GATE_HEADS, BIAS_HEADS, PIECES, STEP, CHUNK, TRANSPOSED, STAGES, PRECISION,
        )  # fmt: skip
    start = 0
    for i in tl.static_range(len(PIECES)):
        o_q = start + tl.arange(0, PIECES[i])
        store_rows(p_dq, b_dqs[i] * scale, o_q, queries, GRADIENT, WIDTH, COLUMNS)
        start += PIECES[i]


@triton.jit(do_not_specialize=COUNTS)
def backward_queries(
    p_q, p_k, p_v, p_gate, p_bias, p_out, p_dout, p_lse, p_delta, p_dq,
    queries, keys, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_doutb, stride_douth, stride_dqb, programs, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, DOUT_STRIDE: tl.constexpr,
    GATE_HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient for long sequences, and each query's delta, the product of its output and gradient.

    p_delta (B, H, queries) float32, written here for backward_keys; the other pointers as in backward_resident
    """
    # This program computes one block of ROWS queries of one head; `programs` of them make up the head.
    i_program = tl.program_id(0)
    i_head = (i_program // programs).to(tl.int64)
    i_b = i_head // HEADS
    i_h = i_head % HEADS
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_out += (i_b * queries * HEADS + i_h) * WIDTH
    p_dout += i_b * stride_doutb + i_h * stride_douth
    p_dq += i_b * stride_dqb + i_h * WIDTH
    base2 = scale * LOG2_E

    o_q = (i_program % programs) * ROWS + tl.arange(0, ROWS)
    b_q = load_rows(p_q, o_q, queries, Q_STRIDE, WIDTH, COLUMNS, False)
    b_out = load_rows(p_out, o_q, queries, HEADS * WIDTH, WIDTH, COLUMNS, False)
    b_dout = load_rows(p_dout, o_q, queries, DOUT_STRIDE, WIDTH, COLUMNS, False)
    b_lse = tl.load(p_lse + i_head * queries + o_q, mask=o_q < queries, other=float("inf"))
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(p_delta + i_head * queries + o_q, b_delta, mask=o_q < queries)
    b_dq = tl.zeros([ROWS, COLUMNS], tl.float32)
    for key in range(0, keys, STEP):
        o_k = key + tl.arange(0, STEP)
        b_k = load_rows(p_k, o_k, keys, K_STRIDE, WIDTH, COLUMNS, False)
        b_v = load_rows(p_v, o_k, keys, V_STRIDE, WIDTH, COLUMNS, False)
        b_bias = load_bias(p_bias, i_head, o_k, keys, BIAS_HEADS, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * base2 + b_bias[None, :]  # [ROWS, STEP]
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        if p_gate is not None:
            b_dp *= load_gate(p_gate, i_head, o_k, keys, GATE_HEADS, False)[None, :]
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
    store_rows(p_dq, b_dq * scale, o_q, queries, 3 * HEADS * WIDTH, WIDTH, COLUMNS)


@triton.jit(do_not_specialize=COUNTS)
def backward_keys(
    p_q, p_k, p_v, p_gate, p_bias, p_dout, p_lse, p_delta, p_dk, p_dv, p_dgate, p_dbias,
    queries, keys, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_doutb, stride_douth, stride_dkb, programs, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, DOUT_STRIDE: tl.constexpr,
    GATE_HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr,
    KEYS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys, values, gate and bias for long sequences: queries pass by in blocks of STEP.

    p_delta (B, H, queries) float32, from backward_queries; the other pointers as in backward_resident
    """
    # This program computes one block of KEYS keys of one head; `programs` of them make up the head.
    i_program = tl.program_id(0)
    i_head = (i_program // programs).to(tl.int64)
    i_b = i_head // HEADS
    i_h = i_head % HEADS
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_dout += i_b * stride_doutb + i_h * stride_douth
    p_dk += i_b * stride_dkb + i_h * WIDTH
    p_dv += i_b * stride_dkb + i_h * WIDTH
    base2 = scale * LOG2_E

    o_k = (i_program % programs) * KEYS + tl.arange(0, KEYS)
    b_k = load_rows(p_k, o_k, keys, K_STRIDE, WIDTH, COLUMNS, False)
    b_v = load_rows(p_v, o_k, keys, V_STRIDE, WIDTH, COLUMNS, False)
    b_bias = load_bias(p_bias, i_head, o_k, keys, BIAS_HEADS, False)
    if p_gate is not None:
        b_gate = load_gate(p_gate, i_head, o_k, keys, GATE_HEADS, False)
    b_dgate = tl.zeros([KEYS], tl.float32)
    b_dbias = tl.zeros([KEYS], tl.float32)
    b_dk = tl.zeros([KEYS, COLUMNS], tl.float32)
    b_dv = tl.zeros([KEYS, COLUMNS], tl.float32)
    for query in range(0, queries, STEP):
        o_q = query + tl.arange(0, STEP)
        b_q = load_rows(p_q, o_q, queries, Q_STRIDE, WIDTH, COLUMNS, False)
        b_dout = load_rows(p_dout, o_q, queries, DOUT_STRIDE, WIDTH, COLUMNS, False)
        b_lse = tl.load(p_lse + i_head * queries + o_q, mask=o_q < queries, other=float("inf"))
        b_delta = tl.load(p_delta + i_head * queries + o_q, mask=o_q < queries, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * base2 + b_bias[:, None]  # [KEYS, STEP]
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        if p_dgate is not None:
            b_dgate += tl.sum(b_p * b_dp, 1)
        if p_gate is not None:
            b_dp *= b_gate[:, None]
        b_ds = b_p * (b_dp - b_delta[None, :])
        if p_dbias is not None:
            b_dbias += tl.sum(b_ds, 1)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    if p_gate is not None:
        b_dv *= b_gate[:, None]
    store_rows(p_dv, b_dv, o_k, keys, 3 * HEADS * WIDTH, WIDTH, COLUMNS)
    store_rows(p_dk, b_dk * scale, o_k, keys, 3 * HEADS * WIDTH, WIDTH, COLUMNS)
    if p_dgate is not None:
        tl.store(p_dgate + i_head * keys + o_k, b_dgate, mask=o_k < keys)
    if p_dbias is not None:
        tl.store(p_dbias + i_head * keys + o_k, b_dbias, mask=o_k < keys)
