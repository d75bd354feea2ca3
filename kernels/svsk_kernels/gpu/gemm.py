# SPDX-License-Identifier: Apache-2.0
"""More tokens than decode, fewer than pay for writing the weight out: weights scaled in registers.

Each weight is multiplied by its scale once (half an instruction) instead of each partial sum, which
decode does because it has few of them; of scales of two levels by the integer code, and the sums by
the row's scale at the end. Programs are numbered so that those running together share
blocks of rows: the packed weight is read from memory once, and from the second-level cache for
every further block of tokens.

Checkpoint                          Run time (repack_base, repack_sidecar)
weight_packed  int32 [N, K / 8]     words  int16 [padded N, padded K / 4]
  a word: 8 neighbours in K           a word: 4 codes, PLANE columns apart
weight_scale   [N, K / group]       scale  [groups of padded K, padded N]
  two levels: int8, with              scale  [runs of words, padded N], a byte for each plane
weight_row_scale  [N, 1]            row_scale  [padded N]
sidecar_u      int8 [N, B, r]       u      uint8, flat: row after row of each slot, [B * r] padded
  (4 bits: two neighbours a byte)     (4 bits: two a byte, 16 z columns apart)
sidecar_v, sidecar_gain             z      [M, z columns], made by shrink.py
"""

import triton
import triton.language as tl

from svsk_kernels.gpu.primitives import (
    add_sidecar,
    group_scales,
    join_planes,
    load_columns,
    load_planes,
    load_scale_words,
    place,
    scale_planes,
    unpack_codes,
)

__all__ = ["gemm_kernel"]


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    # tensors
    x,  # [M, K] bf16 or fp16, rows x_stride apart
    words,  # int16 [padded N, padded K / 4]: four codes a word, PLANE columns apart
    scale,  # [groups, padded N] bf16 or fp16; with row_scale [runs, padded N] int32, int16 or int8
    row_scale,  # [padded N] bf16 or fp16; None: scales of one level
    bias,  # [N] bf16 or fp16; not read without HAS_BIAS
    row_table,  # int32 [3, padded N]: first byte of U, first z column, end of the z columns
    u,  # uint8, flat: 8-bit factors, or two of 4 bits a byte
    z,  # [M, z columns] bf16 or fp16: gain * (V x) / u_step, rows z_stride apart
    z_used,  # uint8 [z columns]: 0 in padding, where z holds anything
    y,  # [M, N] bf16 or fp16, contiguous
    # sizes
    m,  # tokens M
    n,  # outputs N
    k,  # inputs K
    n_padded,  # N padded to whole blocks
    x_stride,  # elements
    word_stride,  # words
    z_stride,  # elements: the number of z columns
    steps,  # runs of STEP words in a row of words
    # blocks
    BLOCK_M: tl.constexpr,  # tokens per program
    BLOCK_N: tl.constexpr,  # outputs per program
    PLANE: tl.constexpr,  # columns between the four codes of a word
    STEP: tl.constexpr,  # words per turn: a divisor of PLANE, and of GROUP but with row_scale
    GROUP: tl.constexpr,  # weights per scale
    JOIN: tl.constexpr,  # one product of the columns of all planes
    # what there is
    SIDECAR_BITS: tl.constexpr,  # of the factors: 8 or 4; 0 means no sidecar
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K needs no padding: columns are loaded without a mask
    QUAD8: tl.constexpr,  # codebook quad8 instead of int4
    # how it is computed
    DTYPE: tl.constexpr,  # of the matrix products
    ASM: tl.constexpr,  # unpack codes with inline PTX
    STAGES: tl.constexpr,  # turns whose loads are under way
):
    """``y[m, n] = x W_hat^T + bias`` for one block of BLOCK_N rows and BLOCK_M tokens.

    Grid: (ceil(M / BLOCK_M), ceil(N / BLOCK_N)).
    """
    # where this program stands: neighbours in the first dimension share the weight's rows
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < m)[None, :]
    row, token = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_M
    rows, run = tl.arange(0, BLOCK_N), tl.arange(0, STEP)
    word_row, word_offs = place(words, row, rows[:, None], word_stride, run[None, :], JOIN)
    scales, scale_offs = place(scale, row, rows, 1, 0, JOIN)
    # rows of x: with JOIN those beyond M are the last one, which saves masks
    tokens = tl.arange(0, BLOCK_M)
    if JOIN:
        tokens = tl.minimum(tokens, m - 1 - token)
    x_row, x_offs = place(x, token, tokens[None, :], x_stride, 0, JOIN)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # a loop that may be left out would set the sums otherwise than by products, and ptxas then
    # has each product wait for the one before
    tl.assume(steps > 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        # load and unpack four planes: exact integers (or quad8 levels)
        q0, q1, q2, q3 = unpack_codes(
            tl.load(word_row + (word_offs + step * STEP)), DTYPE, ASM, QUAD8
        )
        # column of the first plane: PLANE // STEP turns go through a block of 4 * PLANE columns
        start = step // (PLANE // STEP) * (4 * PLANE) + step % (PLANE // STEP) * STEP
        # scale the weights: one rounding to DTYPE per weight
        if row_scale is not None:
            scale_words = load_scale_words(
                scales, scale_offs, step, n_padded, STEP, PLANE, GROUP, JOIN
            )
            w0, w1, w2, w3 = scale_planes(q0, q1, q2, q3, scale_words, DTYPE, ASM)
        else:
            s0, s1, s2, s3 = group_scales(scales, scale_offs, start, n_padded, PLANE, GROUP, JOIN)
            w0, w1 = q0 * s0.to(DTYPE), q1 * s1.to(DTYPE)
            w2, w3 = q2 * s2.to(DTYPE), q3 * s3.to(DTYPE)
        # the activations of each plane's columns, and the products
        if JOIN:
            columns = load_planes(x_row, x_offs, start, k, DTYPE, PLANE, STEP, EVEN_K)
            acc = tl.dot(join_planes(w0, w1, w2, w3), columns, acc)
        else:
            x0 = load_columns(x_row, start, k, mask_m, DTYPE, STEP, EVEN_K)
            x1 = load_columns(x_row, start + PLANE, k, mask_m, DTYPE, STEP, EVEN_K)
            x2 = load_columns(x_row, start + 2 * PLANE, k, mask_m, DTYPE, STEP, EVEN_K)
            x3 = load_columns(x_row, start + 3 * PLANE, k, mask_m, DTYPE, STEP, EVEN_K)
            acc = tl.dot(w3, x3, tl.dot(w2, x2, tl.dot(w1, x1, tl.dot(w0, x0, acc))))
    if row_scale is not None:  # once per row: after all products
        acc *= tl.load(row_scale + offs_n).to(tl.float32)[:, None]
    # epilogue: U z, bias, and tokens as the rows of y
    if SIDECAR_BITS:
        acc = add_sidecar(
            acc,
            offs_n,
            offs_m,
            m,
            n_padded,
            z_stride,
            row_table,
            u,
            z,
            z_used,
            0,
            SIDECAR_BITS,
            DTYPE,
            1,
        )
    if HAS_BIAS:
        acc += tl.load(bias + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    mask = (offs_m < m)[:, None] & (offs_n < n)[None, :]
    y_row, y_offs = place(y, token, tl.arange(0, BLOCK_M)[:, None], n, offs_n[None, :], JOIN)
    tl.store(y_row + y_offs, tl.trans(acc).to(y.dtype.element_ty), mask=mask)
