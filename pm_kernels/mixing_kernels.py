"""The Triton kernels of mixes by a dense matrix. Names: p_ pointers, i_ indices, o_ offsets, b_ blocks, m_ masks.

Tokens may stand in two parts, in two tensors: `first` rows in one, all later ones in the other, which is None where
there are none. ALIGNED says that every row of every tensor starts at a multiple of 16 bytes.
"""

import triton
import triton.language as tl

# Counts are not compiled in: a model whose blocks have different numbers of tokens runs the same few kernels.
COUNTS = (
    "rows", "tokens", "entries", "by_image", "first", "split", "normed", "row_programs", "width_programs",
    "token_programs", "programs", "items", "batch", "splits", "chunks",
)  # fmt: skip


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of float32. Triton 3.6 cannot put an element of a tuple into a shape."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def in_parts(p_first, p_second, o_r, first, stride_first, stride_second, ALIGNED: tl.constexpr):
    """Pointers [R] to the rows ``o_r`` of tokens in two parts."""
    if p_second is None:
        return p_first + o_r * stride_first
    else:
        p_rows = tl.where(o_r < first, p_first + o_r * stride_first, p_second + (o_r - first) * stride_second)
        # The compiler does not see it through a choice of pointers, and would load number by number.
        return tl.multiple_of(p_rows, 16) if ALIGNED else p_rows


@triton.jit
def load_matrix(
    p_matrix, o_r, rows, o_n, tokens, chunks, stride,
    TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A block [R, N] of a matrix, or of the transpose of one (tokens, chunks * CHUNK), whose padding holds zeros."""
    if TRANSPOSED:
        padded = chunks * CHUNK  # so the compiler knows that it is a multiple, and does not load number by number
        p_block = p_matrix + o_n[:, None] * stride + o_r[None, :]
        return tl.trans(tl.load(p_block, mask=(o_n < tokens)[:, None] & (o_r < padded)[None, :], other=0.0))
    else:
        return tl.load(p_matrix + o_r[:, None] * stride + o_n[None, :], mask=(o_r < rows)[:, None], other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def mix(
    p_matrix, p_x, p_carried, p_weight, p_bias, p_y, p_rest, p_normed,
    rows, tokens, chunks, first, split, normed, width, row_programs, width_programs, stride_matrix,
    stride_xb, stride_xn, stride_cb, stride_cn, stride_yb, stride_yn, stride_rb, stride_rn, eps,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mix tokens by a dense matrix, y[b] = matrix @ x[b] or, TRANSPOSED, matrix^T @ x[b], and normalise the first rows.

    p_matrix (rows, stride_matrix), or TRANSPOSED (tokens, stride_matrix), zeros after its last column, to a multiple of
    CHUNK: `chunks` of them
    p_x (B, first, width), p_carried (B, tokens - first, width) or None: any strides, rows contiguous
    p_weight, p_bias (width,), p_normed (B, normed, width), or None: nothing is normalised
    p_y (B, split, width), p_rest (B, rows - split, width) or None: any strides, rows contiguous

    What is normalised is written first and read again, by the same program and so from the cache: a whole row of a wide
    model does not fit into registers beside enough other rows to reuse what is read for it.
    """
    # This program computes ROWS rows of one image, every `width_programs`-th block of COLUMNS of them.
    i_program = tl.program_id(0)
    i_row = i_program % row_programs
    i_width = i_program // row_programs % width_programs
    i_b = (i_program // row_programs // width_programs).to(tl.int64)
    o_r = i_row * ROWS + tl.arange(0, ROWS)
    p_x += i_b * stride_xb
    p_y += i_b * stride_yb
    if p_carried is not None:
        p_carried += i_b * stride_cb
    if p_rest is not None:
        p_rest += i_b * stride_rb
    p_written = in_parts(p_y, p_rest, o_r, split, stride_yn, stride_rn, ALIGNED)
    b_mean = tl.zeros([ROWS], tl.float32)
    b_square = tl.zeros([ROWS], tl.float32)  # the sum of squared distances from the mean
    for w in range(i_width * COLUMNS, width, width_programs * COLUMNS):
        o_w = w + tl.arange(0, COLUMNS)
        m_w = (o_w < width)[None, :]
        b_y = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.range(0, tl.cdiv(tokens, CHUNK), num_stages=STAGES):
            o_n = i * CHUNK + tl.arange(0, CHUNK)
            b_m = load_matrix(p_matrix, o_r, rows, o_n, tokens, chunks, stride_matrix, TRANSPOSED, CHUNK)
            p_read = in_parts(p_x, p_carried, o_n, first, stride_xn, stride_cn, ALIGNED)
            b_x = tl.load(p_read[:, None] + o_w[None, :], mask=(o_n < tokens)[:, None] & m_w, other=0.0)
            b_y = tl.dot(b_m, b_x, b_y, input_precision=PRECISION)
        b_y = b_y.to(p_y.dtype.element_ty)
        tl.store(p_written[:, None] + o_w[None, :], b_y, mask=(o_r < rows)[:, None] & m_w)
        if p_normed is not None:
            # Statistics of this block of columns join those of the columns before it.
            b_y = b_y.to(tl.float32)
            count = tl.minimum(width - w, COLUMNS).to(tl.float32)
            b_block = tl.sum(b_y, 1) / count
            b_d = tl.where(m_w, b_y - b_block[:, None], 0.0)
            b_rounding = tl.sum(b_d, 1) / count  # see row_kernels.statistics
            b_block += b_rounding
            b_square += tl.maximum(tl.sum(b_d * b_d, 1) - b_rounding * b_rounding * count, 0.0)
            b_shift = b_block - b_mean
            share = count / (w + count)
            b_square += b_shift * b_shift * w * share
            b_mean += b_shift * share
    if p_normed is not None:
        tl.debug_barrier()  # a row is read by other threads than wrote it
        b_rstd = tl.rsqrt(b_square / width + eps)
        p_normed += (i_b * normed + o_r) * width
        for w in range(0, width, COLUMNS):
            o_w = w + tl.arange(0, COLUMNS)
            m_w = o_w < width
            m_y = (o_r < normed)[:, None] & m_w[None, :]
            b_weight = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
            b_bias = tl.load(p_bias + o_w, mask=m_w, other=0.0).to(tl.float32)
            b_y = tl.load(p_written[:, None] + o_w[None, :], mask=m_y, other=0.0).to(tl.float32)
            b_y = (b_y - b_mean[:, None]) * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
            tl.store(p_normed[:, None] + o_w[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=COUNTS)
def matrix_gradient(
    p_dy, p_drest, p_x, p_carried, p_partial,
    batch, rows, tokens, split, first, width, stride_yb, stride_yn, stride_rb, stride_rn,
    stride_xb, stride_xn, stride_cb, stride_cn, row_programs, token_programs, splits,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a dense matrix, dy x^T summed over images, in `splits` parts.

    p_dy (B, split, width), p_drest (B, rows - split, width) or None, p_x (B, first, width),
    p_carried (B, tokens - first, width) or None: any strides, rows contiguous; p_partial (splits, rows, tokens) float32
    """
    # This program sums one block [ROWS, TOKENS] over every `splits`-th image.
    i_program = tl.program_id(0)
    i_row = i_program % row_programs
    i_token = i_program // row_programs % token_programs
    i_split = i_program // row_programs // token_programs
    o_r = i_row * ROWS + tl.arange(0, ROWS)
    o_n = i_token * TOKENS + tl.arange(0, TOKENS)
    i_b = i_split.to(tl.int64)
    b_sum = tl.zeros([ROWS, TOKENS], tl.float32)
    for _ in range(i_split, batch, splits):
        p_dys = in_parts(
            p_dy + i_b * stride_yb, None if p_drest is None else p_drest + i_b * stride_rb,
            o_r, split, stride_yn, stride_rn, ALIGNED
        )  # fmt: skip
        p_xs = in_parts(
            p_x + i_b * stride_xb, None if p_carried is None else p_carried + i_b * stride_cb,
            o_n, first, stride_xn, stride_cn, ALIGNED
        )  # fmt: skip
        for w in tl.range(0, width, CHUNK, num_stages=STAGES):
            o_w = w + tl.arange(0, CHUNK)
            m_w = (o_w < width)[None, :]
            b_dy = tl.load(p_dys[:, None] + o_w[None, :], mask=(o_r < rows)[:, None] & m_w, other=0.0)
            b_x = tl.load(p_xs[:, None] + o_w[None, :], mask=(o_n < tokens)[:, None] & m_w, other=0.0)
            b_sum = tl.dot(b_dy, tl.trans(b_x), b_sum, input_precision=PRECISION)
        i_b += splits
    p_block = p_partial + (i_split * rows + o_r[:, None]).to(tl.int64) * tokens + o_n[None, :]
    tl.store(p_block, b_sum, mask=(o_r < rows)[:, None] & (o_n < tokens)[None, :])
