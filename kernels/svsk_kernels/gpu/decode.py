# SPDX-License-Identifier: Apache-2.0
"""Few tokens: the packed weight is streamed once.

Every code meets the tensor cores as an exact integer, or level, unless scales have two levels.

``acc[BLOCK_N, BLOCK_M] = W x^T``: the weight is the first operand, so that what was unpacked in
registers stays there, and the tokens are the short side. Products of one plane are scaled in
float32 after their matrix product; with 64 tokens it takes fewer instructions to scale the weights
(``SCALE_WEIGHTS``). Where one block of rows per program leaves the GPU idle, the columns are split
as well: partial sums go to memory, and whichever program of a block arrives last adds them in the
order of the splits, so that every run gives the same bits.

Scales of two levels always scale the weights, by their integer codes: a turn then takes a whole
plane whatever the size of groups, which saves more than the half instruction per weight costs, and
the products are one chain. A weight is rounded once, as a dequantised one is. The row's scale comes
after all products of a program.

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

__all__ = ["decode_kernel"]


@triton.jit(do_not_specialize=["m"])
def decode_kernel(
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
    partial,  # float32 [SPLIT_K, M, padded N]: sums of each split; not used with SPLIT_K 1
    counters,  # int32 [blocks of rows * blocks of tokens], zero before and after
    # sizes
    m,  # tokens M
    n,  # outputs N
    k,  # inputs K
    n_padded,  # N padded to whole blocks
    x_stride,  # elements
    word_stride,  # words
    z_stride,  # elements: the number of z columns
    steps,  # runs of STEP words in a row of words
    steps_per_split,  # turns of the loop of each split
    # blocks
    BLOCK_M: tl.constexpr,  # tokens per program
    BLOCK_N: tl.constexpr,  # outputs per program
    PLANE: tl.constexpr,  # columns between the four codes of a word
    STEP: tl.constexpr,  # words per turn: a divisor of PLANE, and of GROUP but with row_scale
    GROUP: tl.constexpr,  # weights per scale
    SPLIT_K: tl.constexpr,  # programs that share the columns of a block
    SCALE_WEIGHTS: tl.constexpr,  # scale weights before the products, not sums after them
    JOIN: tl.constexpr,  # one product of the columns of all planes; needs SCALE_WEIGHTS
    # what there is
    SIDECAR_BITS: tl.constexpr,  # of the factors: 8 or 4; 0 means no sidecar
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K needs no padding: columns are loaded without a mask
    QUAD8: tl.constexpr,  # codebook quad8 instead of int4
    # how it is computed
    DTYPE: tl.constexpr,  # of the matrix products
    ASM: tl.constexpr,  # unpack codes with inline PTX
    PDL: tl.constexpr,  # z comes from a kernel that may still run
    STAGES: tl.constexpr,  # turns whose loads are under way
):
    """``y = x W_hat^T + bias`` for one block of BLOCK_N outputs and BLOCK_M tokens.

    Grid: (ceil(N / BLOCK_N), SPLIT_K, ceil(M / BLOCK_M)); a program takes one of SPLIT_K runs of
    columns.
    """
    # where this program stands; tokens beyond M are masked, words are padded to whole blocks
    block, split = tl.program_id(0), tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < m)[None, :]
    row, token = block * BLOCK_N, tl.program_id(2) * BLOCK_M
    rows, run = tl.arange(0, BLOCK_N), tl.arange(0, STEP)
    word_row, word_offs = place(words, row, rows[:, None], word_stride, run[None, :], JOIN)
    scales, scale_offs = place(scale, row, rows, 1, 0, JOIN)
    # rows of x: with JOIN those beyond M are the last one, which saves masks
    tokens = tl.arange(0, BLOCK_M)
    if JOIN:
        tokens = tl.minimum(tokens, m - 1 - token)
    x_row, x_offs = place(x, token, tokens[None, :], x_stride, 0, JOIN)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * steps_per_split
    stop = tl.minimum(first + steps_per_split, steps)
    # A loop that may be left out would set the sums otherwise than by products, and ptxas then has
    # each product wait for the one before; no split is empty. Not with scales of two levels: there
    # Triton 3.9 then writes sums after the last wgmma.fence, which PTX does not allow (quad8,
    # groups of 16, found by the emulator).
    if row_scale is None:
        tl.assume(first < stop)
    for step in tl.range(first, stop, num_stages=STAGES):
        # the packed weight: each byte is read once in this launch, so it should not push x out of
        # the cache
        packed = tl.load(word_row + (word_offs + step * STEP), eviction_policy="evict_first")
        # unpack: or the code into a mantissa, subtract once; exact integers (or quad8 levels)
        q0, q1, q2, q3 = unpack_codes(packed, DTYPE, ASM, QUAD8)
        # column of the first plane: PLANE // STEP turns go through a block of 4 * PLANE columns
        start = step // (PLANE // STEP) * (4 * PLANE) + step % (PLANE // STEP) * STEP
        # the scales of each plane's columns
        if row_scale is not None:
            scale_words = load_scale_words(
                scales, scale_offs, step, n_padded, STEP, PLANE, GROUP, JOIN
            )
            w0, w1, w2, w3 = scale_planes(q0, q1, q2, q3, scale_words, DTYPE, ASM)
        else:
            s0, s1, s2, s3 = group_scales(scales, scale_offs, start, n_padded, PLANE, GROUP, JOIN)
            if SCALE_WEIGHTS:  # BLOCK_M sums a row cost more to scale than STEP weights
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
            # as few float32 multiplications as planes with different scales allow
            if row_scale is not None or SCALE_WEIGHTS:
                acc = tl.dot(w3, x3, tl.dot(w2, x2, tl.dot(w1, x1, tl.dot(w0, x0, acc))))
            elif 4 * PLANE <= GROUP:  # the four planes share a scale
                products = tl.dot(q3, x3, tl.dot(q2, x2, tl.dot(q1, x1, tl.dot(q0, x0))))
                acc += products * s0.to(tl.float32)
            elif 2 * PLANE <= GROUP:
                acc += tl.dot(q1, x1, tl.dot(q0, x0)) * s0.to(tl.float32)
                acc += tl.dot(q3, x3, tl.dot(q2, x2)) * s2.to(tl.float32)
            else:
                acc += tl.dot(q0, x0) * s0.to(tl.float32)
                acc += tl.dot(q1, x1) * s1.to(tl.float32)
                acc += tl.dot(q2, x2) * s2.to(tl.float32)
                acc += tl.dot(q3, x3) * s3.to(tl.float32)
    if row_scale is not None:  # once per row: after all products
        acc *= tl.load(row_scale + offs_n).to(tl.float32)[:, None]
    # the sidecar: dealt out to the splits from the last on, as far as there are z columns at all
    if SIDECAR_BITS:
        share = SPLIT_K - 1 - split
        if share * 32 < z_stride:
            if PDL:  # z comes from the kernel launched just before; all above ran beside it
                tl.extra.cuda.gdc_wait()
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
                share,
                SIDECAR_BITS,
                DTYPE,
                SPLIT_K,
            )
    # the bias counts once
    if HAS_BIAS and split == SPLIT_K - 1:
        acc += tl.load(bias + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    # to memory: tokens are the rows of y
    out = tl.trans(acc)
    if SPLIT_K == 1:
        y_at = y + offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
        mask = (offs_m < m)[:, None] & (offs_n < n)[None, :]
        tl.store(y_at, out.to(y.dtype.element_ty), mask=mask)
    else:
        part_at = partial + offs_m.to(tl.int64)[:, None] * n_padded + offs_n[None, :]
        size = m.to(tl.int64) * n_padded  # of a split's sums; 64 bits, since M * N may exceed 2**31
        tl.store(part_at + split * size, out, mask=(offs_m < m)[:, None])
        tl.debug_barrier()  # every thread's partial sums are written before the count says so
        counter = counters + tl.program_id(2) * tl.num_programs(0) + block
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1:
            # the last to arrive adds, in the order of the splits: every run gives the same bits.
            # Not all tokens of large blocks at once, which would take all registers twice
            some: tl.constexpr = min(BLOCK_M, 64)
            for begin in range(token, token + BLOCK_M, some):
                some_m = begin + tl.arange(0, some)
                total = tl.zeros((some, BLOCK_N), tl.float32)
                some_at = partial + some_m.to(tl.int64)[:, None] * n_padded + offs_n[None, :]
                for index in range(SPLIT_K):
                    # .cg: other programs wrote these, so the first-level cache must not answer
                    total += tl.load(
                        some_at + index * size,
                        mask=(some_m < m)[:, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                mask = (some_m < m)[:, None] & (offs_n < n)[None, :]
                y_at = y + some_m.to(tl.int64)[:, None] * n + offs_n[None, :]
                tl.store(y_at, total.to(y.dtype.element_ty), mask=mask)
            tl.atomic_xchg(counter, 0)  # for the next launch
