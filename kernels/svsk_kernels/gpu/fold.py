# SPDX-License-Identifier: Apache-2.0
"""Many tokens: write ``W_hat``, base and sidecar in one, for an ordinary product in 16 bits.

All of it is float32 before it is rounded: scales of two levels are multiplied out, which is exact.

Checkpoint                          Run time (repack_base, repack_sidecar)
weight_packed  int32 [N, K / 8]     words  int16 [padded N, padded K / 4]
  a word: 8 neighbours in K           a word: 4 codes, PLANE columns apart
weight_scale   [N, K / group]       scale  [groups of padded K, padded N]
  two levels: int8, with              scale  [runs of words, padded N], a byte for each plane
weight_row_scale  [N, 1]            row_scale  [padded N]
sidecar_u      int8 [N, B, r]       u      uint8, flat: row after row of each slot, [B * r] padded
  (4 bits: two neighbours a byte)     (4 bits: two a byte, 16 z columns apart)
sidecar_v      int8 [A, r, K]       v      uint8 [rows of V, pitch], found through slot_table
  (4 bits: two neighbours a byte)     (4 bits: two a byte, 64 columns apart)
sidecar_gain   float32 [A, B, r]    gain   float32 [z columns], a slot's in the order of its U
"""

import triton
import triton.language as tl

from svsk_kernels.gpu.primitives import (
    load_scale_words,
    narrow_factors,
    scale_codes,
    spread,
    u_step,
    unpack_codes,
    wide_factors,
)

__all__ = ["fold_kernel"]


@triton.jit
def _u_block(u_row, column, valid, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """U [BLOCK_N, 16] at z columns ``column`` [1, 16], counted from each row's first."""
    if BITS == 8:
        return wide_factors(tl.load(u_row + column, mask=valid, other=0), DTYPE)
    # a byte holds the z columns c and c + 16; 0x88 is two zeros
    byte = tl.load(u_row + column // 32 * 16 + column % 16, mask=valid, other=0x88)
    low, high = narrow_factors(byte, DTYPE)
    return tl.where(column % 32 < 16, low, high)


@triton.jit
def _v_block(v_row, column, valid, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """V [16, columns], zero where ``valid`` is false."""
    if BITS == 8:
        factors = wide_factors(tl.load(v_row + column, mask=valid, other=0), DTYPE)
        return tl.where(valid, factors, 0.0)
    # a byte holds the columns c and c + 64; 0x88 is two zeros
    byte = tl.load(v_row + column // 128 * 64 + column % 64, mask=valid, other=0x88)
    low, high = narrow_factors(byte, DTYPE)
    return tl.where(column % 128 < 64, low, high)


@triton.jit
def _write(
    out_row,  # pointers [BLOCK_N, 1] to rows of out
    q,  # levels [BLOCK_N, PLANE] of dtype DTYPE
    side,  # float32 [BLOCK_N, PLANE]: U (gain * V)
    scale,  # pointers [BLOCK_N, 1] to the rows' first scales
    at,  # first column
    k,  # inputs K
    n_padded,  # N padded to whole blocks
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One plane of ``W_hat`` with scales of one level."""
    columns = at + tl.arange(0, PLANE)
    groups = columns // GROUP
    if not EVEN_K:
        groups = tl.where(columns < k, groups, 0)
    scales = tl.load(scale + groups.to(tl.int64)[None, :] * n_padded)
    _write_scaled(out_row, q, side, scales, at, k, PLANE, EVEN_K)


@triton.jit
def _write_scaled(
    out_row,  # as above
    q,
    side,
    scales,  # floating [BLOCK_N, PLANE] or [BLOCK_N, 1]
    at,
    k,
    PLANE: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One plane of ``W_hat``: base and sidecar added in float32 and rounded once."""
    columns = at + tl.arange(0, PLANE)
    value = (q.to(tl.float32) * scales.to(tl.float32) + side).to(out_row.dtype.element_ty)
    if EVEN_K:
        tl.store(out_row + columns[None, :], value)
    else:
        tl.store(out_row + columns[None, :], value, mask=(columns < k)[None, :])


@triton.jit(do_not_specialize=["row_start"])
def fold_kernel(
    # tensors
    words,  # int16 [padded N, padded K / 4]: four codes a word, PLANE columns apart
    scale,  # [groups, padded N] bf16 or fp16; with row_scale [runs, padded N] int32, int16 or int8
    row_scale,  # [padded N] bf16 or fp16; None: scales of one level
    row_table,  # int32 [3, padded N]: first byte of U, first z column, end of the z columns
    u,  # uint8, flat: 8-bit factors, or two of 4 bits a byte
    v,  # uint8 [rows of V, v_pitch]
    gain,  # float32 [z columns], 0 in padding
    # int32 [slots, 8]: first row, end, V row, rank, z column, first inner edge, tile width, tiles
    slot_table,
    block_slots,  # int32 [padded N / 64, 2]: first slot and end of each block of 64 rows
    out,  # [rows, K] bf16 or fp16, rows a multiple of BLOCK_N
    # sizes
    row_start,  # first row to write out, a multiple of BLOCK_N
    k,  # inputs K
    n_padded,  # N padded to whole blocks
    word_stride,  # words
    v_pitch,  # bytes of a row of V
    # blocks
    BLOCK_N: tl.constexpr,  # rows per program: FOLD_ROWS
    PLANE: tl.constexpr,  # columns between the four codes of a word
    GROUP: tl.constexpr,  # weights per scale
    # what there is
    SIDECAR_BITS: tl.constexpr,  # of the factors: 8 or 4; 0 means no sidecar
    EVEN_K: tl.constexpr,  # K needs no padding
    QUAD8: tl.constexpr,  # codebook quad8 instead of int4
    # how it is computed
    DTYPE: tl.constexpr,  # of the matrix products
    ASM: tl.constexpr,  # unpack codes with inline PTX
):
    """Rows ``row_start`` onwards of ``W_hat``.

    Grid (rows / BLOCK_N, padded K / (4 * PLANE)), BLOCK_N = FOLD_ROWS.

    A block of rows may meet several slots and a block of columns several
    column tiles; each pair adds its own product.
    """
    # where this program stands: rows of out, the same rows of the layer, its first column
    offs_out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = row_start + offs_out
    start = tl.program_id(1) * (4 * PLANE)
    side0 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    side1 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    side2 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    side3 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    # the sidecar: each slot of these rows, each column tile of these columns, 16 ranks at a time
    if SIDECAR_BITS:
        block = row_start // BLOCK_N + tl.program_id(0)
        ranks = tl.arange(0, 16)
        column0 = (start + tl.arange(0, PLANE))[None, :]
        u_row = u + tl.load(row_table + rows)[:, None]
        # slots that these rows meet
        for slot in range(tl.load(block_slots + block * 2), tl.load(block_slots + block * 2 + 1)):
            entry = slot_table + slot * 8
            mask_n = ((rows >= tl.load(entry)) & (rows < tl.load(entry + 1)))[:, None]
            v_start, rank, z_start = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
            edge, width, tiles = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
            # tiles that these columns meet: tile 0 ends at `edge`, all others are `width` wide, and
            # columns of padding belong to the last
            last_tile = tiles - 1
            tile_first = tl.where(
                start < edge, 0, tl.minimum(1 + (start - edge) // width, last_tile)
            )
            end = start + 4 * PLANE - 1
            tile_last = tl.where(end < edge, 0, tl.minimum(1 + (end - edge) // width, last_tile))
            for tile in range(tile_first, tile_last + 1):
                left = tl.where(tile == 0, 0, edge + (tile - 1) * width)
                right = tl.minimum(edge + tile * width, k)
                for rank_start in range(0, rank, 16):
                    # U times gain, once for all four planes; over u_step, so that float16 holds it
                    rank_columns = rank_start + ranks
                    mask_rank = rank_columns < rank
                    z_column = tile * rank + rank_columns
                    factor = tl.load(gain + z_start + z_column, mask=mask_rank, other=0.0)
                    factor = factor / u_step(SIDECAR_BITS)
                    valid = mask_n & mask_rank[None, :]
                    u_block = _u_block(u_row, z_column[None, :], valid, SIDECAR_BITS, DTYPE)
                    u_block = (u_block.to(tl.float32) * factor[None, :]).to(DTYPE)
                    # times V of each plane's columns, as far as they lie in this tile
                    v_row = v + (v_start + rank_columns).to(tl.int64)[:, None] * v_pitch
                    valid = mask_rank[:, None] & (column0 >= left) & (column0 < right)
                    v_block = _v_block(v_row, column0, valid, SIDECAR_BITS, DTYPE)
                    side0 = tl.dot(u_block, v_block, side0)
                    column = column0 + PLANE
                    valid = mask_rank[:, None] & (column >= left) & (column < right)
                    v_block = _v_block(v_row, column, valid, SIDECAR_BITS, DTYPE)
                    side1 = tl.dot(u_block, v_block, side1)
                    column = column0 + 2 * PLANE
                    valid = mask_rank[:, None] & (column >= left) & (column < right)
                    v_block = _v_block(v_row, column, valid, SIDECAR_BITS, DTYPE)
                    side2 = tl.dot(u_block, v_block, side2)
                    column = column0 + 3 * PLANE
                    valid = mask_rank[:, None] & (column >= left) & (column < right)
                    v_block = _v_block(v_row, column, valid, SIDECAR_BITS, DTYPE)
                    side3 = tl.dot(u_block, v_block, side3)
        side0 *= u_step(SIDECAR_BITS)
        side1 *= u_step(SIDECAR_BITS)
        side2 *= u_step(SIDECAR_BITS)
        side3 *= u_step(SIDECAR_BITS)
    # the base, and the sum of both, rounded once
    offs_word = tl.program_id(1) * PLANE + tl.arange(0, PLANE)
    word_row = words + rows.to(tl.int64)[:, None] * word_stride
    q0, q1, q2, q3 = unpack_codes(tl.load(word_row + offs_word[None, :]), DTYPE, ASM, QUAD8)
    out_row = out + offs_out.to(tl.int64)[:, None] * k
    scales = scale + rows[:, None]
    if row_scale is not None:
        scale_words = load_scale_words(
            scale + rows, 0, tl.program_id(1), n_padded, PLANE, PLANE, GROUP, False
        )
        c0, c1, c2, c3 = scale_codes(scale_words, ASM)
        # the product of both levels is exact
        row = tl.load(row_scale + rows).to(tl.float32)[:, None]
        s0, s1, s2, s3 = (
            spread(c0 * row, PLANE),
            spread(c1 * row, PLANE),
            spread(c2 * row, PLANE),
            spread(c3 * row, PLANE),
        )
        _write_scaled(out_row, q0, side0, s0, start, k, PLANE, EVEN_K)
        _write_scaled(out_row, q1, side1, s1, start + PLANE, k, PLANE, EVEN_K)
        _write_scaled(out_row, q2, side2, s2, start + 2 * PLANE, k, PLANE, EVEN_K)
        _write_scaled(out_row, q3, side3, s3, start + 3 * PLANE, k, PLANE, EVEN_K)
    else:
        _write(out_row, q0, side0, scales, start, k, n_padded, GROUP, PLANE, EVEN_K)
        _write(out_row, q1, side1, scales, start + PLANE, k, n_padded, GROUP, PLANE, EVEN_K)
        _write(out_row, q2, side2, scales, start + 2 * PLANE, k, n_padded, GROUP, PLANE, EVEN_K)
        _write(out_row, q3, side3, scales, start + 3 * PLANE, k, n_padded, GROUP, PLANE, EVEN_K)
