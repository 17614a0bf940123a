"""The Triton kernel that matches tokens. Names as in the other kernels; i_ also counts.

An image is one program's, from its features to the rows of its matrix: what one thread leaves in memory for another is
read after a barrier, with which each step begins that reads what the step before it wrote. Counts of tokens are read at
run time, and every loop goes by blocks, so one kernel serves all lengths. Merged tokens are numbered with the prefix
tokens first, and each round numbers them anew.
"""

import triton
import triton.language as tl

from .row_kernels import gather, load_state, normalise, store_pieces

COUNTS = ("batch", "tokens", "left", "prefix", "rounds", "programs")


@triton.jit
def store_features(
    p_features, p_squares, b_fs, o_n, m_n, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr
):
    """Write the features of the tokens ``o_n`` [R] and the squares of their lengths, of what is written."""
    b_square = tl.sum(tl.zeros_like(b_fs[0]), 1)
    for i in tl.static_range(len(PIECES)):
        b_f = b_fs[i].to(p_features.dtype.element_ty).to(tl.float32)
        b_square += tl.sum(b_f * b_f, 1)
    store_pieces(p_features + o_n * WIDTH, b_fs, m_n, WIDTH, PIECES, WHOLE)
    tl.store(p_squares + o_n, b_square, mask=m_n)


@triton.jit
def begin(p_segments, p_clusters, p_sizes, tokens, stride_sn, TOKENS: tl.constexpr):
    """Every token a segment of its own, of the token's size."""
    for i_n in range(0, tokens, TOKENS):
        o_n = i_n + tl.arange(0, TOKENS)
        m_n = o_n < tokens
        tl.store(p_segments + o_n, o_n, mask=m_n)
        tl.store(p_clusters + o_n, tl.load(p_sizes + o_n * stride_sn, mask=m_n).to(tl.float32), mask=m_n)


@triton.jit
def merges_of_round(patches, left, following):
    """How many of ``patches`` merge, with ``following`` rounds after this one, see reference.merges_by_round."""
    # No image has so many patches that more halvings than 16 make a difference.
    i_most = ((left + 1) << tl.minimum(following, 16)) - 1
    return tl.maximum((patches - left + following) // (following + 1), patches - i_most)


@triton.jit
def take_features(
    p_x, p_update, p_weight, p_bias, p_features, p_squares, tokens, stride_xn, stride_un, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What a first round compares: an image's x + update, or the LayerNorm of it."""
    for i_n in range(0, tokens, ROWS):
        o_n = i_n + tl.arange(0, ROWS)
        m_n = o_n < tokens
        b_fs = load_state(
            p_x, p_update, None, o_n, m_n, tokens, stride_xn, stride_un, 0, WIDTH, PIECES, WHOLE, ALIGNED
        )  # fmt: skip
        if p_weight is not None:
            b_fs = normalise(b_fs, p_weight, p_bias, eps, ROWS, WIDTH, PIECES, WHOLE)
        store_features(p_features, p_squares, b_fs, o_n, m_n, WIDTH, PIECES, WHOLE)


@triton.jit
def take_means(
    p_features, p_rows, p_columns, p_weights, p_means, p_squares, rows, tokens,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What a later round compares: the means of the features by the matrix of the round before."""
    for i_n in range(0, rows, ROWS):
        o_n = i_n + tl.arange(0, ROWS)
        b_fs = gather(
            p_features, None, None, p_rows, p_columns, p_weights, o_n, rows, tokens, tokens, WIDTH, 0, 0,
            ROWS, WIDTH, PIECES, WHOLE, ALIGNED,
        )  # fmt: skip
        store_features(p_means, p_squares, b_fs, o_n, o_n < rows, WIDTH, PIECES, WHOLE)


@triton.jit
def propose(
    p_features, p_squares, p_clusters, p_cheapest, p_places, prefix, sources, targets, width,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, ROOTS: tl.constexpr,
):  # fmt: skip
    """Each source's cheapest target: its cost goes to p_cheapest (sources,), its number to p_places (sources,)."""
    tl.debug_barrier()
    for i_s in range(0, sources, SOURCES):
        o_s = i_s + tl.arange(0, SOURCES)
        m_s = o_s < sources
        o_row = prefix + 2 * o_s
        b_cheapest = tl.full([SOURCES], float("inf"), tl.float32)
        b_partner = tl.zeros([SOURCES], tl.int32)
        for i_t in range(0, targets, TARGETS):
            o_t = i_t + tl.arange(0, TARGETS)
            m_t = o_t < targets
            o_column = prefix + 2 * o_t + 1
            b_products = tl.zeros([SOURCES, TARGETS], tl.float32)
            for d in tl.range(0, width, CHUNK, num_stages=STAGES):
                o_d = d + tl.arange(0, CHUNK)
                m_d = (o_d < width)[None, :]
                b_s = tl.load(p_features + o_row[:, None] * width + o_d[None, :], mask=m_s[:, None] & m_d, other=0.0)
                b_t = tl.load(p_features + o_column[:, None] * width + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
                b_products = tl.dot(b_s, tl.trans(b_t), b_products, input_precision=PRECISION)
            b_lengths = tl.load(p_squares + o_row, mask=m_s, other=0.0)[:, None]
            b_lengths += tl.load(p_squares + o_column, mask=m_t, other=0.0)[None, :]
            b_distances = b_lengths - 2 * b_products
            # What is lost in rounding is no distance: 8 times the spacing of float32 at 1.
            b_distances = tl.where(b_distances < 8 * 1.1920928955078125e-07 * b_lengths, 0.0, b_distances)
            b_source = tl.load(p_clusters + o_row, mask=m_s, other=1.0)[:, None]
            b_target = tl.load(p_clusters + o_column, mask=m_t, other=1.0)[None, :]
            if ROOTS:
                b_source, b_target = tl.sqrt_rn(b_source), tl.sqrt_rn(b_target)
            b_costs = b_distances * (b_source * b_target / (b_source + b_target))
            b_costs = tl.where(m_t[None, :] & (b_costs < float("inf")), b_costs, float("inf"))  # no number is infinite
            b_least, b_index = tl.min(b_costs, 1, return_indices=True)  # of equal ones, the first
            b_partner = tl.where(b_least < b_cheapest, i_t + b_index, b_partner)
            b_cheapest = tl.minimum(b_least, b_cheapest)
        tl.store(p_cheapest + o_s, b_cheapest, mask=m_s)
        tl.store(p_places + o_s, b_partner, mask=m_s)


@triton.jit
def carry_out(p_cheapest, p_places, prefix, sources, merges, TOKENS: tl.constexpr):
    """Carry out the cheapest proposals: p_places (sources,) holds each source's target, and then its new number."""
    tl.debug_barrier()
    i_staying = prefix
    for i_s in range(0, sources, TOKENS):
        o_s = i_s + tl.arange(0, TOKENS)
        m_s = o_s < sources
        b_cost = tl.load(p_cheapest + o_s, mask=m_s, other=0.0)
        b_rank = tl.zeros([TOKENS], tl.int32)
        for i_k in range(0, sources, TOKENS):
            o_k = i_k + tl.arange(0, TOKENS)
            b_k = tl.load(p_cheapest + o_k, mask=o_k < sources, other=float("inf"))[None, :]
            # Those past the last source cost as much as a proposal can, and come after all others.
            m_before = (b_k < b_cost[:, None]) | ((b_k == b_cost[:, None]) & (o_k[None, :] < o_s[:, None]))
            b_rank += tl.sum(m_before.to(tl.int32), 1)
        b_stays = (m_s & (b_rank >= merges)).to(tl.int32)
        b_place = i_staying + tl.cumsum(b_stays, 0) - b_stays
        b_target = prefix + sources - merges + tl.load(p_places + o_s, mask=m_s, other=0)
        tl.debug_barrier()  # several threads read a number that one overwrites
        tl.store(p_places + o_s, tl.where(b_stays == 1, b_place, b_target), mask=m_s)
        i_staying += tl.sum(b_stays, 0)


@triton.jit
def renumber(p_segments, p_places, tokens, prefix, staying, TOKENS: tl.constexpr):
    """The segments (tokens,) by the round's new numbers: sources as p_places says, then targets, in their order."""
    tl.debug_barrier()
    for i_n in range(0, tokens, TOKENS):
        o_n = i_n + tl.arange(0, TOKENS)
        m_n = o_n < tokens
        b_segment = tl.load(p_segments + o_n, mask=m_n, other=0)
        b_patch = tl.maximum(b_segment - prefix, 0)
        m_source = m_n & (b_segment >= prefix) & (b_patch % 2 == 0)
        b_source = tl.load(p_places + b_patch // 2, mask=m_source, other=0)
        b_new = tl.where(m_source, b_source, prefix + staying + b_patch // 2)
        tl.debug_barrier()  # as above
        tl.store(p_segments + o_n, tl.where(b_segment < prefix, b_segment, b_new), mask=m_n)


@triton.jit
def count(p_segments, p_sizes, o_n, b_segment, tokens, stride_sn, TOKENS: tl.constexpr):
    """For the tokens ``o_n`` [TOKENS]: how many stand before them in order of segments, how many of these in the same
    segment, and the size of all of that segment."""
    b_place = tl.zeros([TOKENS], tl.int32)
    b_ahead = tl.zeros([TOKENS], tl.int32)
    b_total = tl.zeros([TOKENS], tl.float32)
    b_key = (b_segment * tokens + o_n)[:, None]
    for i_k in range(0, tokens, TOKENS):
        o_k = i_k + tl.arange(0, TOKENS)
        m_k = o_k < tokens
        b_other = tl.load(p_segments + o_k, mask=m_k, other=tokens)
        b_size = tl.load(p_sizes + o_k * stride_sn, mask=m_k, other=0.0).to(tl.float32)
        m_before = (b_other * tokens + o_k)[None, :] < b_key
        m_same = b_other[None, :] == b_segment[:, None]
        b_place += tl.sum(m_before.to(tl.int32), 1)
        b_ahead += tl.sum((m_before & m_same).to(tl.int32), 1)
        b_total += tl.sum(tl.where(m_same, b_size[None, :], 0.0), 1)
    return b_place, b_ahead, b_total


@triton.jit(do_not_specialize=COUNTS)
def match(
    p_x, p_update, p_weight, p_bias, p_sizes, p_segments, p_merged, p_logs, p_starts, p_columns, p_values, p_by_starts,
    p_entries, p_features, p_numbers, p_indices, batch, tokens, left, prefix, rounds, programs, width,
    stride_xb, stride_xn, stride_ub, stride_un, stride_sb, stride_sn, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, ROOTS: tl.constexpr,
):  # fmt: skip
    """Match the tokens of each image in some rounds, and write the matrix that merges them.

    p_x (B, tokens, WIDTH), p_update the same or None: any strides, rows contiguous; p_sizes (B, tokens), any strides
    p_weight, p_bias (WIDTH,), or None: x + update are the features, and not their LayerNorm
    p_segments (B, tokens); p_merged, p_logs (B, left) float32: sizes of merged tokens and their logarithms
    p_starts (B, left), p_columns, p_values (B, tokens): the matrix by its rows; p_by_starts, p_entries (B, tokens): by
    its columns, with one entry in each, whose row is p_segments
    p_features (programs, 2, tokens, WIDTH): the tokens' features, and the means of them that a later round compares
    p_numbers (programs, 4, tokens) float32, p_indices (programs, 2, tokens) int32: of a round
    """
    # This program matches every `programs`-th image.
    i_program = tl.program_id(0).to(tl.int64)
    p_features += i_program * 2 * tokens * WIDTH
    p_means = p_features + tokens * WIDTH
    p_squares = p_numbers + i_program * 4 * tokens
    p_cheapest = p_squares + tokens
    p_weights = p_cheapest + tokens  # (tokens,), of the matrix of a round that is not the last
    p_clusters = p_weights + tokens  # the sizes of what a round matches
    p_places = p_indices + i_program * 2 * tokens
    p_rows = p_places + tokens  # where each row of the matrix of such a round starts
    for i_image in range(tl.program_id(0), batch, programs):
        i_b = tl.full([], i_image, tl.int64)
        p_segment = p_segments + i_b * tokens
        p_column = p_columns + i_b * tokens
        p_size = p_sizes + i_b * stride_sb
        begin(p_segment, p_clusters, p_size, tokens, stride_sn, TOKENS)
        i_patches = tokens - prefix
        for i_round in range(0, rounds):
            i_following = rounds - 1 - i_round
            i_merges = merges_of_round(i_patches, left - prefix, i_following)
            i_sources = (i_patches + 1) // 2
            if i_round == 0:
                take_features(
                    p_x + i_b * stride_xb, None if p_update is None else p_update + i_b * stride_ub, p_weight, p_bias,
                    p_features, p_squares, tokens, stride_xn, stride_un, eps, ROWS, WIDTH, PIECES, WHOLE, ALIGNED,
                )  # fmt: skip
                p_compared = p_features
            else:
                take_means(
                    p_features, p_rows, p_column, p_weights, p_means, p_squares, prefix + i_patches, tokens,
                    ROWS, WIDTH, PIECES, WHOLE, ALIGNED,
                )  # fmt: skip
                p_compared = p_means
            propose(
                p_compared, p_squares, p_clusters, p_cheapest, p_places, prefix, i_sources, i_patches // 2, width,
                SOURCES, TARGETS, CHUNK, STAGES, PRECISION, ROOTS,
            )  # fmt: skip
            carry_out(p_cheapest, p_places, prefix, i_sources, i_merges, TOKENS)
            renumber(p_segment, p_places, tokens, prefix, i_sources - i_merges, TOKENS)
            tl.debug_barrier()
            i_patches -= i_merges
            for i_n in range(0, tokens, TOKENS):
                o_n = i_n + tl.arange(0, TOKENS)
                m_n = o_n < tokens
                b_segment = tl.load(p_segment + o_n, mask=m_n, other=0)
                b_place, b_ahead, b_total = count(p_segment, p_size, o_n, b_segment, tokens, stride_sn, TOKENS)
                b_weight = tl.load(p_size + o_n * stride_sn, mask=m_n, other=0.0).to(tl.float32) / b_total
                m_first = m_n & (b_ahead == 0)
                tl.store(p_column + b_place, o_n, mask=m_n)
                if i_following == 0:
                    o_c = i_b * left + b_segment
                    tl.store(p_merged + o_c, b_total, mask=m_first)
                    tl.store(p_logs + o_c, tl.log(b_total), mask=m_first)
                    tl.store(p_starts + o_c, b_place, mask=m_first)
                    tl.store(p_values + i_b * tokens + b_place, b_weight.to(p_values.dtype.element_ty), mask=m_n)
                    tl.store(p_by_starts + i_b * tokens + o_n, o_n, mask=m_n)
                    tl.store(p_entries + i_b * tokens + o_n, b_place, mask=m_n)
                else:
                    tl.store(p_clusters + b_segment, b_total, mask=m_first)
                    tl.store(p_rows + b_segment, b_place, mask=m_first)
                    tl.store(p_weights + b_place, b_weight, mask=m_n)
            tl.debug_barrier()
