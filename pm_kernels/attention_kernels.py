"""The Triton kernels of the attention's forward. Names: p_ pointers, i_ indices, o_ offsets, b_ blocks, m_ masks.

Logits are kept in base 2: ``scale`` and the bias are multiplied by log2(e) once, and the softmax takes ``exp2``.
``lse`` is the base-2 logarithm of a row's softmax denominator, and +inf for a row without any key, so that
``exp2(logit - lse)`` is the attention matrix, with 0 where there is nothing to attend to.
"""

import triton
import triton.language as tl

from .mixing_kernels import zeros

# Counts are not compiled in: a model whose blocks have different numbers of tokens runs the same few kernels.
COUNTS = ("queries", "keys", "tokens", "programs", "tiles")
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(p_x, o_n, count, STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows ``o_n`` [R] of a matrix (count, WIDTH): [R, COLUMNS], zeros past its edges. WHOLE: no row is past them."""
    o_d = tl.arange(0, COLUMNS)
    p_rows = p_x + o_n[:, None] * STRIDE + o_d[None, :]
    if WHOLE and WIDTH == COLUMNS:
        return tl.load(p_rows)
    elif WHOLE:
        return tl.load(p_rows, mask=(o_d < WIDTH)[None, :], other=0.0)
    elif WIDTH == COLUMNS:
        return tl.load(p_rows, mask=(o_n < count)[:, None], other=0.0)
    else:
        return tl.load(p_rows, mask=(o_n < count)[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(p_y, b_y, o_n, count, STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Write [R, COLUMNS] to the rows ``o_n`` [R] of a matrix (count, WIDTH)."""
    o_d = tl.arange(0, COLUMNS)
    m_rows = (o_n < count)[:, None]
    if WIDTH != COLUMNS:
        m_rows = m_rows & (o_d < WIDTH)[None, :]
    tl.store(p_y + o_n[:, None] * STRIDE + o_d[None, :], b_y.to(p_y.dtype.element_ty), mask=m_rows)


@triton.jit
def store_columns(p_y, b_y, o_n, count, STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the transpose of [COLUMNS, R] to the rows ``o_n`` [R] of a matrix (count, WIDTH)."""
    o_d = tl.arange(0, COLUMNS)
    m_rows = (o_n < count)[None, :]
    if WIDTH != COLUMNS:
        m_rows = m_rows & (o_d < WIDTH)[:, None]
    tl.store(p_y + o_n[None, :] * STRIDE + o_d[:, None], b_y.to(p_y.dtype.element_ty), mask=m_rows)


@triton.jit
def load_gate(p_gate, i_head, o_k, keys, HEADS: tl.constexpr, WHOLE: tl.constexpr):
    """The gates [R] of the keys ``o_k``: HEADS heads share a row, or all where it is 0; zeros past the last key."""
    p_keys = p_gate + o_k
    if HEADS > 0:
        p_keys += i_head // HEADS * keys
    if WHOLE:
        return tl.load(p_keys).to(tl.float32)
    else:
        return tl.load(p_keys, mask=o_k < keys, other=0.0).to(tl.float32)


@triton.jit
def load_bias(p_bias, i_head, o_k, keys, HEADS: tl.constexpr, WHOLE: tl.constexpr):
    """What is added to the base-2 logits of the keys ``o_k`` [R]: their bias, and -inf past the last key."""
    if p_bias is None:
        return tl.where(o_k < keys, 0.0, float("-inf"))
    else:
        p_keys = p_bias + o_k
        if HEADS > 0:
            p_keys += i_head // HEADS * keys
        if WHOLE:
            return tl.load(p_keys).to(tl.float32) * LOG2_E
        else:
            return tl.load(p_keys, mask=o_k < keys, other=float("-inf")).to(tl.float32) * LOG2_E


@triton.jit
def load_merge(p_merge, stride_merge, o_c, rows, o_n):
    """A block [R, N] of the merge matrix (rows, padded tokens), whose padding holds zeros."""
    return tl.load(p_merge + o_c[:, None] * stride_merge + o_n[None, :], mask=(o_c < rows)[:, None], other=0.0)


@triton.jit
def take_rows(
    p_merge, p_x, o_c, count, tokens, stride_merge,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, MERGED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows ``o_c`` [R] of x (count, WIDTH) or, MERGED, of merge (count, tokens) @ x: [R, COLUMNS] in x's dtype."""
    if MERGED:
        b_y = tl.zeros([o_c.shape[0], COLUMNS], tl.float32)
        for n in tl.range(0, tokens, CHUNK, num_stages=STAGES):
            o_n = n + tl.arange(0, CHUNK)
            b_m = load_merge(p_merge, stride_merge, o_c, count, o_n)
            b_x = load_rows(p_x, o_n, tokens, STRIDE, WIDTH, COLUMNS, False)
            b_y = tl.dot(b_m, b_x, b_y, input_precision=PRECISION)
        return b_y.to(p_x.dtype.element_ty)
    else:
        return load_rows(p_x, o_c, count, STRIDE, WIDTH, COLUMNS, WHOLE)


@triton.jit
def attend(
    b_q, b_k, b_v, b_bias, b_max, b_sum, b_out, scale,
    BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: queries [R, D] over a block of keys and values [K, D].

    Takes and returns each row's largest logit [R], sum of exponentials [R] and unnormalised output [R, D].
    """
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [R, K]
    if BIASED:
        b_s += b_bias[None, :]
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A row that has met no key yet keeps a finite shift: -inf minus -inf is not a number.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_rescale = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_out


@triton.jit
def store_attended(
    p_out, p_lse, b_max, b_sum, b_out, o_q, queries,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalise and write the rows ``o_q`` of the output, and their lse."""
    m_empty = b_sum == 0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    store_rows(p_out, b_out * (1.0 / b_sum)[:, None], o_q, queries, STRIDE, WIDTH, COLUMNS)
    b_lse = tl.where(m_empty, float("inf"), b_max + tl.log2(b_sum))
    tl.store(p_lse + o_q, b_lse, mask=o_q < queries)


@triton.jit
def attend_resident(
    b_q, b_ks, b_vs, p_bias, p_out, p_lse, i_head, o_q, queries, keys, scale,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS_HEADS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries [R, D] over all of a head's keys and values, tuples of [PIECE, D]; writes the rows ``o_q``."""
    b_max = tl.full([b_q.shape[0]], float("-inf"), tl.float32)
    b_sum = tl.zeros([b_q.shape[0]], tl.float32)
    b_out = tl.zeros([b_q.shape[0], b_q.shape[1]], tl.float32)
    start = 0
    for i in tl.static_range(len(PIECES)):
        o_k = start + tl.arange(0, PIECES[i])
        b_bias = load_bias(p_bias, i_head, o_k, keys, BIAS_HEADS, i + 1 < len(PIECES))
        b_max, b_sum, b_out = attend(
            b_q, b_ks[i], b_vs[i], b_bias, b_max, b_sum, b_out, scale,
            p_bias is not None or i + 1 == len(PIECES), PRECISION,
        )  # fmt: skip
        start += PIECES[i]
    store_attended(p_out, p_lse, b_max, b_sum, b_out, o_q, queries, STRIDE, WIDTH, COLUMNS)


@triton.jit(do_not_specialize=COUNTS)
def forward_resident(
    p_q, p_k, p_v, p_merge, p_gate, p_bias, p_out, p_lse,
    queries, keys, tokens, stride_merge, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    programs, tiles, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GATE_HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr, MERGE_QUERIES: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of short sequences: all keys and values of a head stay on the chip.

    p_q (B, H, tokens of q, WIDTH), p_k, p_v (B, H, tokens, WIDTH), a token every Q_STRIDE and so on
    p_merge (keys, stride_merge) or None
    p_gate (B * H / GATE_HEADS, keys) or, where that is 0, (keys,), or None; p_bias likewise
    p_out (B, queries, H, WIDTH); p_lse (B, H, queries) float32

    PIECES are the blocks of keys, in order; only the last reaches past the last key.
    """
    # This program computes `tiles` blocks of ROWS queries of one head; `programs` of them make up the head.
    i_program = tl.program_id(0)
    i_head = (i_program // programs).to(tl.int64)
    i_b = i_head // HEADS
    i_h = i_head % HEADS
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_out += (i_b * queries * HEADS + i_h) * WIDTH
    p_lse += i_head * queries
    scale *= LOG2_E
    # One block of queries that is also the only block of keys is merged in the same loop as they are.
    TOGETHER: tl.constexpr = p_merge is not None and MERGE_QUERIES and len(PIECES) == 1 and PIECES[0] == ROWS

    b_ks = ()  # one [PIECE, COLUMNS] for each of PIECES, as are b_vs
    b_vs = ()
    start = 0
    for i in tl.static_range(len(PIECES)):
        o_k = start + tl.arange(0, PIECES[i])
        if p_merge is not None:
            b_k = zeros(PIECES[i], COLUMNS)
            b_v = zeros(PIECES[i], COLUMNS)
            b_q = tl.zeros([ROWS, COLUMNS], tl.float32)
            for n in tl.range(0, tokens, CHUNK, num_stages=STAGES):
                o_n = n + tl.arange(0, CHUNK)
                b_m = load_merge(p_merge, stride_merge, o_k, keys, o_n)
                b_x = load_rows(p_k, o_n, tokens, K_STRIDE, WIDTH, COLUMNS, False)
                b_k = tl.dot(b_m, b_x, b_k, input_precision=PRECISION)
                b_x = load_rows(p_v, o_n, tokens, V_STRIDE, WIDTH, COLUMNS, False)
                b_v = tl.dot(b_m, b_x, b_v, input_precision=PRECISION)
                if TOGETHER:
                    b_x = load_rows(p_q, o_n, tokens, Q_STRIDE, WIDTH, COLUMNS, False)
                    b_q = tl.dot(b_m, b_x, b_q, input_precision=PRECISION)
            b_q = b_q.to(p_q.dtype.element_ty)
        else:
            b_k = load_rows(p_k, o_k, keys, K_STRIDE, WIDTH, COLUMNS, i + 1 < len(PIECES))
            b_v = load_rows(p_v, o_k, keys, V_STRIDE, WIDTH, COLUMNS, i + 1 < len(PIECES))
        if p_gate is not None:
            # Gating the values once costs less than gating the attention matrix in every block of queries.
            b_v *= load_gate(p_gate, i_head, o_k, keys, GATE_HEADS, i + 1 < len(PIECES))[:, None]
        b_ks += (b_k.to(p_k.dtype.element_ty),)
        b_vs += (b_v.to(p_v.dtype.element_ty),)
        start += PIECES[i]

    if TOGETHER:
        attend_resident(
            b_q, b_ks, b_vs, p_bias, p_out, p_lse, i_head, tl.arange(0, ROWS), queries, keys, scale,
            HEADS * WIDTH, WIDTH, COLUMNS, BIAS_HEADS, PIECES, PRECISION,
        )  # fmt: skip
    else:
        first = (i_program % programs) * tiles
        for tile in tl.range(first, tl.minimum(first + tiles, tl.cdiv(queries, ROWS)), num_stages=1):
            o_q = tile * ROWS + tl.arange(0, ROWS)
            b_q = take_rows(
                p_merge, p_q, o_q, queries, tokens, stride_merge, Q_STRIDE, WIDTH, COLUMNS, CHUNK, STAGES, PRECISION,
                p_merge is not None and MERGE_QUERIES, False,
            )  # fmt: skip
            attend_resident(
                b_q, b_ks, b_vs, p_bias, p_out, p_lse, i_head, o_q, queries, keys, scale,
                HEADS * WIDTH, WIDTH, COLUMNS, BIAS_HEADS, PIECES, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def forward_streaming(
    p_q, p_k, p_v, p_gate, p_bias, p_out, p_lse,
    queries, keys, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, programs, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    GATE_HEADS: tl.constexpr, BIAS_HEADS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of long sequences: keys and values pass by in blocks of STEP.

    p_q (B, H, queries, WIDTH), p_k, p_v (B, H, keys, WIDTH), a token every Q_STRIDE and so on
    p_gate, p_bias: as in forward_resident
    p_out (B, queries, H, WIDTH); p_lse (B, H, queries) float32
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
    p_lse += i_head * queries
    scale *= LOG2_E

    o_q = (i_program % programs) * ROWS + tl.arange(0, ROWS)
    b_q = load_rows(p_q, o_q, queries, Q_STRIDE, WIDTH, COLUMNS, False)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, keys, STEP):
        o_k = start + tl.arange(0, STEP)
        b_k = load_rows(p_k, o_k, keys, K_STRIDE, WIDTH, COLUMNS, False)
        b_v = load_rows(p_v, o_k, keys, V_STRIDE, WIDTH, COLUMNS, False)
        if p_gate is not None:
            b_v = (b_v * load_gate(p_gate, i_head, o_k, keys, GATE_HEADS, False)[:, None]).to(b_v.dtype)
        b_bias = load_bias(p_bias, i_head, o_k, keys, BIAS_HEADS, False)
        b_max, b_sum, b_out = attend(b_q, b_k, b_v, b_bias, b_max, b_sum, b_out, scale, True, PRECISION)
    store_attended(p_out, p_lse, b_max, b_sum, b_out, o_q, queries, HEADS * WIDTH, WIDTH, COLUMNS)
