# SPDX-License-Identifier: Apache-2.0
"""The sidecar's first half, ``z = gain * (V x)``: from K columns to a few, all tiles in one launch.

The kernel that multiplies the base adds ``U z`` in its epilogue. On sm_90 and later it may start
while this one runs (programmatic dependent launch) and waits only there.

Checkpoint                          Run time (repack_sidecar)
sidecar_v     int8 [A, r, K]        v     uint8 [rows of V, pitch], a row per rank of every slot
  (4 bits: two neighbours a byte)     (4 bits: two a byte, 64 columns apart)
sidecar_gain  float32 [A, B, r]     gain  float32 [z columns], a slot's in the order of its U
"""

import triton
import triton.language as tl

from svsk_kernels.gpu.primitives import narrow_factors, u_step, wide_factors

__all__ = ["shrink_kernel"]


@triton.jit
def _x_block(x, offs_m, m, x_stride, columns, first, stop, DTYPE: tl.constexpr):
    """Activations [4, columns, BLOCK_M] of columns [4, columns]; zero outside [first, stop)."""
    mask = ((columns >= first) & (columns < stop))[:, :, None] & (offs_m < m)[None, None, :]
    return tl.load(
        x + offs_m.to(tl.int64)[None, None, :] * x_stride + columns[:, :, None],
        mask=mask,
        other=0.0,
    ).to(DTYPE)


@triton.jit(do_not_specialize=["m"])
def shrink_kernel(
    # tensors
    x,  # [M, K] bf16 or fp16, rows x_stride apart
    v,  # uint8 [rows of V, v_pitch] and a tail that is read but not used
    gain,  # float32 [z columns], 0 in padding
    v_table,  # int32 [2, rows of V]: z column in tile 0 (-1: padding), z columns per tile
    # int32 [jobs, 6]: row of V, first column, end, tile, first job of the same sums, number of them
    jobs,
    z,  # [M, z columns] bf16 or fp16; padding columns are not written
    partial,  # float32 [jobs, M, 16]: sums of jobs that share a tile; not used without LONG_TILES
    counters,  # int32 [jobs * blocks of tokens], zero before and after
    # sizes
    m,  # tokens M
    x_stride,  # elements
    v_pitch,  # bytes of a row of V
    v_rows,  # rows of V, padding included
    z_stride,  # elements: the number of z columns
    # blocks
    BLOCK_M: tl.constexpr,  # tokens per program
    # what there is
    BITS: tl.constexpr,  # of the factors: 8 or 4
    LONG_TILES: tl.constexpr,  # some tiles are longer than a job, and summed from several
    ALIGNED: tl.constexpr,  # all tiles begin at multiples of 16 columns
    # how it is computed
    DTYPE: tl.constexpr,  # of the matrix products
    PDL: tl.constexpr,  # let the next kernel start beside this one
    STAGES: tl.constexpr,  # turns whose loads are under way
):
    """16 rows of V times one run of columns of x, for BLOCK_M tokens.

    Grid (jobs, ceil(M / BLOCK_M)).

    Jobs that share a tile (only with ``LONG_TILES``) sum through ``partial``: the last to arrive
    adds, in the order of the jobs, so that every run gives the same bits.
    """
    if PDL:  # the next kernel may start now: it waits for z only in its epilogue
        tl.extra.cuda.gdc_launch_dependents()
    # which rows of V and which columns
    job = jobs + tl.program_id(0) * 6
    row, first, stop, tile = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    if ALIGNED:  # the tiles' edges are multiples of 16: wide copies
        first, stop = tl.multiple_of(first, 16), tl.multiple_of(stop, 16)
    ranks = tl.arange(0, 16)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # each of four warps multiplies its own quarter of the columns: nothing is done twice
    quarter = tl.arange(0, 4)[:, None]
    byte = tl.arange(0, 64)[None, :]
    v_row = v + (row + ranks).to(tl.int64)[None, :, None] * v_pitch
    sums = tl.zeros((4, 16, BLOCK_M), tl.float32)
    # a turn takes 4 x 64 bytes of each row of V: 256 columns of 8 bits or 512 of 4. The first
    # turn starts where copies are aligned, before the job's first column; x is zero outside the job
    if BITS == 8:
        for at in tl.range(first // 16 * 16, stop, 256, num_stages=STAGES):
            columns = tl.multiple_of(at, 16) + quarter * 64 + byte
            # V, unpacked: unmasked, since the tail behind it is there to be read
            factors = wide_factors(tl.load(v_row + columns[:, None, :]), DTYPE)
            # x of the same columns, and the product of each quarter
            x_block = _x_block(x, offs_m, m, x_stride, columns, first, stop, DTYPE)
            sums = tl.dot(factors, x_block, sums)
    else:
        for at in tl.range(first // 128 * 128, stop, 512, num_stages=STAGES):
            columns = tl.multiple_of(at, 128) + quarter * 128 + byte
            # V, unpacked: a byte holds the columns c and c + 64
            offs_v = tl.multiple_of(at // 2, 64) + quarter * 64 + byte
            low, high = narrow_factors(tl.load(v_row + offs_v[:, None, :]), DTYPE)
            # x of the same columns, and the product of each quarter
            x_block = _x_block(x, offs_m, m, x_stride, columns, first, stop, DTYPE)
            sums = tl.dot(low, x_block, sums)
            x_block = _x_block(x, offs_m, m, x_stride, columns + 64, first, stop, DTYPE)
            sums = tl.dot(high, x_block, sums)
    # the quarters together, and with LONG_TILES the jobs of a tile
    total = tl.sum(sums, axis=0)
    mask_m = (offs_m < m)[None, :]
    complete = True
    if LONG_TILES:
        first_job, parts = tl.load(job + 4), tl.load(job + 5)
        if parts > 1:
            size = m.to(tl.int64) * 16
            part_at = partial + offs_m.to(tl.int64)[None, :] * 16 + ranks[:, None]
            tl.store(part_at + tl.program_id(0) * size, total, mask=mask_m)
            tl.debug_barrier()  # every thread's sums are written before the count says so
            counter = counters + first_job * tl.num_programs(1) + tl.program_id(1)
            complete = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
            if complete:
                total = tl.zeros((16, BLOCK_M), tl.float32)
                for index in range(parts):
                    # .cg: other programs wrote these, so the first-level cache must not answer
                    part = part_at + (first_job + index) * size
                    total += tl.load(part, mask=mask_m, other=0.0, cache_modifier=".cg")
                tl.atomic_xchg(counter, 0)  # for the next launch
    # gain, and to the z columns of this tile; dividing by u_step keeps fp16 in range
    if complete:
        column = tl.load(v_table + row + ranks)
        used = column >= 0
        column += tile * tl.load(v_table + v_rows + row + ranks)
        factor = tl.load(gain + column, mask=used, other=0.0) / u_step(BITS)
        z_at = z + offs_m.to(tl.int64)[None, :] * z_stride + column[:, None]
        value = (total * factor[:, None]).to(z.dtype.element_ty)
        tl.store(z_at, value, mask=used[:, None] & mask_m)
