"""The Triton kernels whose programs hold whole rows: mixes by sparse rows, and the gradient of the LayerNorm.

Names as in the kernels of dense mixes. What is mixed is ``x + update`` (update may be None) and, after its rows,
``carried``. The matrix is one for all images where ``by_image`` is 0, and one for each where it is 1. Rows are tuples
of [R, PIECE], as widths are no powers of two; WHOLE says that the PIECES make up the WIDTH exactly.
"""

import triton
import triton.language as tl

from .mixing_kernels import COUNTS, in_parts, zeros


@triton.jit
def load_pieces(p_rows, m_r, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr):
    """The rows at ``p_rows`` [R] in float32, zeros where ``m_r`` is false and past WIDTH."""
    b_xs = ()
    start = 0
    for i in tl.static_range(len(PIECES)):
        o_d = start + tl.arange(0, PIECES[i])
        m_x = m_r[:, None]
        if i + 1 == len(PIECES) and not WHOLE:
            m_x = m_x & (o_d < WIDTH)[None, :]
        b_xs += (tl.load(p_rows[:, None] + o_d[None, :], mask=m_x, other=0.0).to(tl.float32),)
        start += PIECES[i]
    return b_xs


@triton.jit
def store_pieces(p_rows, b_ys, m_r, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr):
    """Write rows to ``p_rows`` [R] where ``m_r`` is true."""
    start = 0
    for i in tl.static_range(len(PIECES)):
        o_d = start + tl.arange(0, PIECES[i])
        m_y = m_r[:, None]
        if i + 1 == len(PIECES) and not WHOLE:
            m_y = m_y & (o_d < WIDTH)[None, :]
        tl.store(p_rows[:, None] + o_d[None, :], b_ys[i].to(p_rows.dtype.element_ty), mask=m_y)
        start += PIECES[i]


@triton.jit
def load_vector(p_vector, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr):
    """A vector (WIDTH,) in float32, one [PIECE] for each of PIECES."""
    b_vs = ()
    start = 0
    for i in tl.static_range(len(PIECES)):
        o_d = start + tl.arange(0, PIECES[i])
        if WHOLE or i + 1 < len(PIECES):
            b_vs += (tl.load(p_vector + o_d).to(tl.float32),)
        else:
            b_vs += (tl.load(p_vector + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32),)
        start += PIECES[i]
    return b_vs


@triton.jit
def load_state(
    p_x, p_update, p_carried, o_n, m_n, first, stride_xn, stride_un, stride_cn,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The rows ``o_n`` [R] of what is mixed, in float32; zeros where ``m_n`` is false."""
    b_xs = load_pieces(in_parts(p_x, p_carried, o_n, first, stride_xn, stride_cn, ALIGNED), m_n, WIDTH, PIECES, WHOLE)
    if p_update is not None:
        b_us = load_pieces(p_update + o_n * stride_un, m_n & (o_n < first), WIDTH, PIECES, WHOLE)
        b_sums = ()
        for i in tl.static_range(len(PIECES)):
            b_sums += (b_xs[i] + b_us[i],)
        return b_sums
    else:
        return b_xs


@triton.jit
def gather(
    p_x, p_update, p_carried, p_starts, p_columns, p_values, o_r, rows, entries, first, stride_xn, stride_un, stride_cn,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The rows ``o_r`` [ROWS] of the mix by sparse rows, in float32; zeros from ``rows`` on."""
    o_e = tl.load(p_starts + o_r, mask=o_r < rows, other=0)
    o_end = tl.load(p_starts + o_r + 1, mask=o_r + 1 < rows, other=entries)
    o_end = tl.where(o_r < rows, o_end, 0)
    b_ys = ()
    for i in tl.static_range(len(PIECES)):
        b_ys += (zeros(ROWS, PIECES[i]),)
    for _ in range(0, tl.max(o_end - o_e, 0)):
        m_e = o_e < o_end
        o_n = tl.load(p_columns + o_e, mask=m_e, other=0)
        b_v = tl.load(p_values + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_xs = load_state(
            p_x, p_update, p_carried, o_n, m_e, first, stride_xn, stride_un, stride_cn, WIDTH, PIECES, WHOLE, ALIGNED
        )  # fmt: skip
        b_sums = ()
        for i in tl.static_range(len(PIECES)):
            b_sums += (b_ys[i] + b_v[:, None] * b_xs[i],)
        b_ys = b_sums
        o_e += 1
    return b_ys


@triton.jit
def statistics(b_ys, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr):
    """Mean and inverse standard deviation [ROWS] of whole rows, which are zero past WIDTH.

    The sum's rounding is the mean's, and would make noise of a row of large equal numbers: what the distances from it
    sum to is taken back.
    """
    b_sum = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(PIECES)):
        b_sum += tl.sum(b_ys[i], 1)
    b_mean = b_sum / WIDTH
    b_shift = tl.zeros([ROWS], tl.float32)
    b_square = tl.zeros([ROWS], tl.float32)
    start = 0
    for i in tl.static_range(len(PIECES)):
        b_d = b_ys[i] - b_mean[:, None]
        if i + 1 == len(PIECES) and not WHOLE:
            b_d = tl.where((start + tl.arange(0, PIECES[i]) < WIDTH)[None, :], b_d, 0.0)
        b_shift += tl.sum(b_d, 1)
        b_square += tl.sum(b_d * b_d, 1)
        start += PIECES[i]
    b_shift /= WIDTH
    return b_mean + b_shift, tl.rsqrt(tl.maximum(b_square / WIDTH - b_shift * b_shift, 0.0) + eps)


@triton.jit
def normalise(
    b_ys, p_weight, p_bias, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The LayerNorm of whole rows."""
    b_mean, b_rstd = statistics(b_ys, eps, ROWS, WIDTH, PIECES, WHOLE)
    b_ws = load_vector(p_weight, WIDTH, PIECES, WHOLE)
    b_bs = load_vector(p_bias, WIDTH, PIECES, WHOLE)
    b_normed = ()
    for i in tl.static_range(len(PIECES)):
        b_normed += ((b_ys[i] - b_mean[:, None]) * b_rstd[:, None] * b_ws[i][None, :] + b_bs[i][None, :],)
    return b_normed


@triton.jit(do_not_specialize=COUNTS)
def gather_forward(
    p_x, p_update, p_carried, p_starts, p_columns, p_values, p_weight, p_bias, p_y, p_rest, p_normed,
    rows, entries, by_image, first, split, normed, row_programs,
    stride_xb, stride_xn, stride_ub, stride_un, stride_cb, stride_cn, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Mix tokens by a matrix of few nonzeros, and normalise the first rows: every row is read as often as it is used.

    p_x (B, first, WIDTH), p_update the same or None, p_carried (B, any, WIDTH) or None: any strides, rows contiguous
    p_starts (rows,), p_columns, p_values (entries,), or (B, ...) by_image
    p_weight, p_bias (WIDTH,), or None: nothing is normalised
    p_y (B, split, WIDTH), p_rest (B, rows - split, WIDTH) or None, p_normed (B, normed, WIDTH) or None
    """
    # This program computes ROWS rows of one image.
    i_program = tl.program_id(0)
    i_b = (i_program // row_programs).to(tl.int64)
    o_r = i_program % row_programs * ROWS + tl.arange(0, ROWS)
    i_matrix = i_b * by_image
    p_x += i_b * stride_xb
    p_y += i_b * split * WIDTH
    if p_update is not None:
        p_update += i_b * stride_ub
    if p_carried is not None:
        p_carried += i_b * stride_cb
    if p_rest is not None:
        p_rest += i_b * (rows - split) * WIDTH
    b_ys = gather(
        p_x, p_update, p_carried, p_starts + i_matrix * rows, p_columns + i_matrix * entries,
        p_values + i_matrix * entries, o_r, rows, entries, first,
        stride_xn, stride_un, stride_cn, ROWS, WIDTH, PIECES, WHOLE, ALIGNED,
    )  # fmt: skip
    store_pieces(in_parts(p_y, p_rest, o_r, split, WIDTH, WIDTH, ALIGNED), b_ys, o_r < rows, WIDTH, PIECES, WHOLE)
    if p_normed is not None:
        b_ns = normalise(b_ys, p_weight, p_bias, eps, ROWS, WIDTH, PIECES, WHOLE)
        store_pieces(p_normed + (i_b * normed + o_r) * WIDTH, b_ns, o_r < normed, WIDTH, PIECES, WHOLE)


@triton.jit(do_not_specialize=COUNTS)
def norm_backward(
    p_x, p_update, p_carried, p_starts, p_columns, p_values, p_weight, p_dnormed, p_dy, p_dmixed, p_partial,
    rows, entries, by_image, first, normed, row_programs, items, programs,
    stride_xb, stride_xn, stride_ub, stride_un, stride_cb, stride_cn,
    stride_nb, stride_nn, stride_yb, stride_yn, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The gradient of a mix whose rows are also normalised: dy plus what comes back through the LayerNorm.

    p_x, p_update, p_carried, p_starts, p_columns, p_values: as in gather_forward, mixed once more; where p_starts is
    None, p_x (B, normed, WIDTH) is the mix itself; p_weight (WIDTH,)
    p_dnormed, p_dy (or None), p_dmixed (B, normed, WIDTH), any strides but for p_dmixed
    p_partial (programs, 2, WIDTH) float32 or None: the gradients of weight and bias, each program's share
    """
    # This program takes every `programs`-th of `items` blocks of ROWS rows.
    i_program = tl.program_id(0)
    b_ws = load_vector(p_weight, WIDTH, PIECES, WHOLE)
    b_dws = ()
    b_dbs = ()
    for i in tl.static_range(len(PIECES)):
        b_dws += (zeros(ROWS, PIECES[i]),)
        b_dbs += (zeros(ROWS, PIECES[i]),)
    i_item = i_program
    for _ in range(i_program, items, programs):
        i_b = (i_item // row_programs).to(tl.int64)
        o_r = i_item % row_programs * ROWS + tl.arange(0, ROWS)
        m_r = o_r < normed
        if p_starts is None:
            b_ys = load_pieces(p_x + i_b * stride_xb + o_r * stride_xn, m_r, WIDTH, PIECES, WHOLE)
        else:
            i_matrix = i_b * by_image
            b_ys = gather(
                p_x + i_b * stride_xb, None if p_update is None else p_update + i_b * stride_ub,
                None if p_carried is None else p_carried + i_b * stride_cb,
                p_starts + i_matrix * rows, p_columns + i_matrix * entries, p_values + i_matrix * entries,
                o_r, rows, entries, first, stride_xn, stride_un, stride_cn,
                ROWS, WIDTH, PIECES, WHOLE, ALIGNED,
            )  # fmt: skip
        b_mean, b_rstd = statistics(b_ys, eps, ROWS, WIDTH, PIECES, WHOLE)
        b_dns = load_pieces(p_dnormed + i_b * stride_nb + o_r * stride_nn, m_r, WIDTH, PIECES, WHOLE)
        b_hats = ()
        b_new_dws = ()
        b_new_dbs = ()
        b_sum = tl.zeros([ROWS], tl.float32)  # of the gradient of the standardised rows
        b_dot = tl.zeros([ROWS], tl.float32)  # with the standardised rows
        for i in tl.static_range(len(PIECES)):
            b_hat = (b_ys[i] - b_mean[:, None]) * b_rstd[:, None]
            b_dhat = b_dns[i] * b_ws[i][None, :]
            b_sum += tl.sum(b_dhat, 1)
            b_dot += tl.sum(b_dhat * b_hat, 1)
            b_new_dws += (b_dws[i] + b_dns[i] * b_hat,)
            b_new_dbs += (b_dbs[i] + b_dns[i],)
            b_hats += (b_hat,)
        b_dws = b_new_dws
        b_dbs = b_new_dbs
        b_sum /= WIDTH
        b_dot /= WIDTH
        b_ds = ()
        for i in tl.static_range(len(PIECES)):
            b_dhat = b_dns[i] * b_ws[i][None, :]
            b_ds += ((b_dhat - b_sum[:, None] - b_hats[i] * b_dot[:, None]) * b_rstd[:, None],)
        if p_dy is not None:
            b_dys = load_pieces(p_dy + i_b * stride_yb + o_r * stride_yn, m_r, WIDTH, PIECES, WHOLE)
            b_sums = ()
            for i in tl.static_range(len(PIECES)):
                b_sums += (b_ds[i] + b_dys[i],)
            b_ds = b_sums
        store_pieces(p_dmixed + (i_b * normed + o_r) * WIDTH, b_ds, m_r, WIDTH, PIECES, WHOLE)
        i_item += programs
    if p_partial is not None:
        p_partial += i_program.to(tl.int64) * 2 * WIDTH
        start = 0
        for i in tl.static_range(len(PIECES)):
            o_d = start + tl.arange(0, PIECES[i])
            tl.store(p_partial + o_d, tl.sum(b_dws[i], 0), mask=o_d < WIDTH)
            tl.store(p_partial + WIDTH + o_d, tl.sum(b_dbs[i], 0), mask=o_d < WIDTH)
            start += PIECES[i]


@triton.jit(do_not_specialize=COUNTS)
def gather_backward(
    p_dy, p_drest, p_starts, p_rows, p_entries, p_values, p_x, p_update, p_carried, p_dx, p_dcarried, p_partial,
    tokens, entries, by_image, split, first, row_programs, stride_yb, stride_yn, stride_rb, stride_rn,
    stride_xb, stride_xn, stride_ub, stride_un, stride_cb, stride_cn,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The gradients of what was mixed by sparse rows, and of the matrix's values, image by image.

    p_dy (B, split, WIDTH), p_drest (B, any, WIDTH) or None, any strides: the gradient of the mix
    p_starts (tokens,), p_rows, p_entries (entries,): the matrix's entries by column; p_values (entries,) by row;
    or (B, ...) by_image
    p_x (B, first, WIDTH), p_update, p_carried: what was mixed, read where p_partial is asked for
    p_dx (B, first, WIDTH), p_dcarried (B, tokens - first, WIDTH) or None, or p_dx None: not asked for
    p_partial (B, entries) float32 or None: each image's share of the gradient of the values
    """
    # This program computes ROWS rows of one image.
    i_program = tl.program_id(0)
    i_b = (i_program // row_programs).to(tl.int64)
    o_n = i_program % row_programs * ROWS + tl.arange(0, ROWS)
    m_n = o_n < tokens
    p_starts += i_b * by_image * tokens
    i_first = (i_b * by_image * entries).to(p_starts.dtype.element_ty)
    p_dy += i_b * stride_yb
    if p_drest is not None:
        p_drest += i_b * stride_rb
    if p_partial is not None:
        p_partial += i_b * entries
        p_x += i_b * stride_xb
        if p_update is not None:
            p_update += i_b * stride_ub
        if p_carried is not None:
            p_carried += i_b * stride_cb
        b_xs = load_state(
            p_x, p_update, p_carried, o_n, m_n, first, stride_xn, stride_un, stride_cn, WIDTH, PIECES, WHOLE, ALIGNED
        )  # fmt: skip
    o_e = tl.load(p_starts + o_n, mask=m_n, other=0)
    o_end = tl.load(p_starts + o_n + 1, mask=o_n + 1 < tokens, other=entries)
    o_end = tl.where(m_n, o_end, 0) + i_first
    o_e += i_first
    b_dxs = ()
    for i in tl.static_range(len(PIECES)):
        b_dxs += (zeros(ROWS, PIECES[i]),)
    for _ in range(0, tl.max(o_end - o_e, 0)):
        m_e = o_e < o_end
        o_r = tl.load(p_rows + o_e, mask=m_e, other=0)
        o_v = tl.load(p_entries + o_e, mask=m_e, other=0)
        b_v = tl.load(p_values + (i_first + o_v), mask=m_e, other=0.0).to(tl.float32)
        b_ds = load_pieces(
            in_parts(p_dy, p_drest, o_r, split, stride_yn, stride_rn, ALIGNED), m_e, WIDTH, PIECES, WHOLE
        )
        b_sums = ()
        b_dot = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(len(PIECES)):
            b_sums += (b_dxs[i] + b_v[:, None] * b_ds[i],)
            if p_partial is not None:
                b_dot += tl.sum(b_ds[i] * b_xs[i], 1)
        b_dxs = b_sums
        if p_partial is not None:
            tl.store(p_partial + o_v, b_dot, mask=m_e)
        o_e += 1
    if p_dx is not None:
        p_dx += i_b * first * WIDTH
        if p_dcarried is not None:
            p_dcarried += i_b * (tokens - first) * WIDTH
        store_pieces(in_parts(p_dx, p_dcarried, o_n, first, WIDTH, WIDTH, ALIGNED), b_dxs, m_n, WIDTH, PIECES, WHOLE)
