# SPDX-License-Identifier: Apache-2.0
"""Many tokens: write ``W_hat``, base and sidecar in one, as 16-bit floats, for an ordinary matrix product."""

import triton
import triton.language as tl

from svsk_kernels.primitives import narrow_factors, u_step, unpack_codes, wide_factors

__all__ = ["fold_kernel"]


@triton.jit
def _u_block(u_row, column, valid, BITS: tl.constexpr, DT: tl.constexpr):
    """U [BN, 16] at z columns ``column`` [1, 16], counted from each row's first."""
    if BITS == 8:
        return wide_factors(tl.load(u_row + column, mask=valid, other=0), DT)
    low, high = narrow_factors(tl.load(u_row + column // 32 * 16 + column % 16, mask=valid, other=0x88), DT)
    return tl.where(column % 32 < 16, low, high)


@triton.jit
def _v_block(v_row, column, valid, BITS: tl.constexpr, DT: tl.constexpr):
    """V [16, columns], zero where ``valid`` is false."""
    if BITS == 8:
        return tl.where(valid, wide_factors(tl.load(v_row + column, mask=valid, other=0), DT), 0.0)
    low, high = narrow_factors(tl.load(v_row + column // 128 * 64 + column % 64, mask=valid, other=0x88), DT)
    return tl.where(column % 128 < 64, low, high)


@triton.jit
def _write(out_row, q, side, scale, at, k, n_padded, GROUP: tl.constexpr, PLANE: tl.constexpr, EVEN_K: tl.constexpr):
    """One plane of ``W_hat``."""
    columns = at + tl.arange(0, PLANE)
    groups = columns // GROUP
    if not EVEN_K:
        groups = tl.where(columns < k, groups, 0)
    scales = tl.load(scale + groups.to(tl.int64)[None, :] * n_padded)
    value = (q.to(tl.float32) * scales.to(tl.float32) + side).to(out_row.dtype.element_ty)
    if EVEN_K:
        tl.store(out_row + columns[None, :], value)
    else:
        tl.store(out_row + columns[None, :], value, mask=(columns < k)[None, :])


@triton.jit(do_not_specialize=["row_start"])
def fold_kernel(
    words,
    scale,
    row_table,
    u,
    v,
    gain,
    slot_table,
    block_slots,
    out,
    row_start,
    k,
    n_padded,
    word_stride,
    v_pitch,
    BN: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    SIDECAR_BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    QUAD8: tl.constexpr,
    DT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Rows ``row_start`` onwards of ``W_hat``; grid (rows / BN, padded K / (4 * PLANE)), BN = FOLD_ROWS.

    ``out`` is [rows, K], rows a multiple of BN. A block of rows may meet several slots and a block of columns several
    column tiles; each pair adds its own product.
    """
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = row_start + local
    start = tl.program_id(1) * (4 * PLANE)
    side0 = tl.zeros((BN, PLANE), tl.float32)
    side1 = tl.zeros((BN, PLANE), tl.float32)
    side2 = tl.zeros((BN, PLANE), tl.float32)
    side3 = tl.zeros((BN, PLANE), tl.float32)
    if SIDECAR_BITS:
        block = row_start // BN + tl.program_id(0)
        ranks = tl.arange(0, 16)
        column0 = (start + tl.arange(0, PLANE))[None, :]
        u_row = u + tl.load(row_table + rows)[:, None]
        for slot in range(tl.load(block_slots + block * 2), tl.load(block_slots + block * 2 + 1)):
            entry = slot_table + slot * 8
            inside = ((rows >= tl.load(entry)) & (rows < tl.load(entry + 1)))[:, None]
            v_start, rank, z_start = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
            edge, width, tiles = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
            # Tile 0 ends at `edge`, all others are `width` wide; columns of padding belong to the last.
            tile_first = tl.where(start < edge, 0, tl.minimum(1 + (start - edge) // width, tiles - 1))
            end = start + 4 * PLANE - 1
            tile_last = tl.where(end < edge, 0, tl.minimum(1 + (end - edge) // width, tiles - 1))
            for tile in range(tile_first, tile_last + 1):
                left = tl.where(tile == 0, 0, edge + (tile - 1) * width)
                right = tl.minimum(edge + tile * width, k)
                for done in range(0, rank, 16):
                    some = done + ranks
                    known = some < rank
                    z_column = tile * rank + some
                    factor = tl.load(gain + z_start + z_column, mask=known, other=0.0) / u_step(SIDECAR_BITS)
                    left_factor = _u_block(u_row, z_column[None, :], inside & known[None, :], SIDECAR_BITS, DT)
                    left_factor = (left_factor.to(tl.float32) * factor[None, :]).to(DT)
                    v_row = v + (v_start + some).to(tl.int64)[:, None] * v_pitch
                    valid = known[:, None] & (column0 >= left) & (column0 < right)
                    side0 = tl.dot(left_factor, _v_block(v_row, column0, valid, SIDECAR_BITS, DT), side0)
                    column = column0 + PLANE
                    valid = known[:, None] & (column >= left) & (column < right)
                    side1 = tl.dot(left_factor, _v_block(v_row, column, valid, SIDECAR_BITS, DT), side1)
                    column = column0 + 2 * PLANE
                    valid = known[:, None] & (column >= left) & (column < right)
                    side2 = tl.dot(left_factor, _v_block(v_row, column, valid, SIDECAR_BITS, DT), side2)
                    column = column0 + 3 * PLANE
                    valid = known[:, None] & (column >= left) & (column < right)
                    side3 = tl.dot(left_factor, _v_block(v_row, column, valid, SIDECAR_BITS, DT), side3)
        side0 *= u_step(SIDECAR_BITS)
        side1 *= u_step(SIDECAR_BITS)
        side2 *= u_step(SIDECAR_BITS)
        side3 *= u_step(SIDECAR_BITS)
    word_at = (
        words + rows.to(tl.int64)[:, None] * word_stride + (tl.program_id(1) * PLANE + tl.arange(0, PLANE))[None, :]
    )
    q0, q1, q2, q3 = unpack_codes(tl.load(word_at), DT, ASM, QUAD8)
    out_row = out + local.to(tl.int64)[:, None] * k
    scales = scale + rows[:, None]
    _write(out_row, q0, side0, scales, start, k, n_padded, GROUP, PLANE, EVEN_K)
    _write(out_row, q1, side1, scales, start + PLANE, k, n_padded, GROUP, PLANE, EVEN_K)
    _write(out_row, q2, side2, scales, start + 2 * PLANE, k, n_padded, GROUP, PLANE, EVEN_K)
    _write(out_row, q3, side3, scales, start + 3 * PLANE, k, n_padded, GROUP, PLANE, EVEN_K)
