# SPDX-License-Identifier: Apache-2.0
"""The sidecar's first half, ``z = gain * (V x)``: from K columns to a few z columns, for all tiles in one launch.

The kernel that multiplies the base adds ``U z`` in its epilogue. On sm_90 and later it may start while this one runs
(programmatic dependent launch) and waits only there.
"""

import triton
import triton.language as tl

from svsk_kernels.primitives import narrow_factors, u_step, wide_factors

__all__ = ["shrink_kernel"]


@triton.jit
def _x_block(x, tokens, m, x_stride, columns, first, stop, DT: tl.constexpr):
    """Activations [4, columns, BM] of the columns [4, columns] that lie within [first, stop), zero elsewhere."""
    mask = ((columns >= first) & (columns < stop))[:, :, None] & (tokens < m)[None, None, :]
    return tl.load(x + tokens.to(tl.int64)[None, None, :] * x_stride + columns[:, :, None], mask=mask, other=0.0).to(DT)


@triton.jit(do_not_specialize=["m"])
def shrink_kernel(
    x,
    v,
    gain,
    v_table,
    jobs,
    z,
    partial,
    counters,
    m,
    x_stride,
    v_pitch,
    v_rows,
    z_stride,
    BM: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DT: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """16 rows of V times one run of columns of x, for BM tokens; grid (jobs, ceil(M / BM)).

    See :mod:`svsk_kernels.layout` for the tensors. ``z`` is [M, z_stride]; padding columns are not written. Jobs that
    share a tile (only where ``SPLIT``) sum through ``partial``, float32 [jobs, M, 16], the last to arrive in the order
    of the jobs; ``counters`` int32 [jobs * grid's second size], zero before and after.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    job = jobs + tl.program_id(0) * 6
    row, first, stop, tile = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    if ALIGNED:  # the tiles' edges are multiples of 16: wide copies
        first, stop = tl.multiple_of(first, 16), tl.multiple_of(stop, 16)
    ranks = tl.arange(0, 16)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    quarter = tl.arange(0, 4)[:, None]  # each warp multiplies its own quarter of the columns: nothing is done twice
    byte = tl.arange(0, 64)[None, :]
    v_row = v + (row + ranks).to(tl.int64)[None, :, None] * v_pitch
    sums = tl.zeros((4, 16, BM), tl.float32)
    if BITS == 8:
        for at in tl.range(first // 16 * 16, stop, 256, num_stages=STAGES):
            columns = tl.multiple_of(at, 16) + quarter * 64 + byte
            factors = wide_factors(tl.load(v_row + columns[:, None, :]), DT)
            sums = tl.dot(factors, _x_block(x, tokens, m, x_stride, columns, first, stop, DT), sums)
    else:
        for at in tl.range(first // 128 * 128, stop, 512, num_stages=STAGES):
            columns = tl.multiple_of(at, 128) + quarter * 128 + byte
            packed = tl.load(v_row + (tl.multiple_of(at // 2, 64) + quarter * 64 + byte)[:, None, :])
            low, high = narrow_factors(packed, DT)
            sums = tl.dot(low, _x_block(x, tokens, m, x_stride, columns, first, stop, DT), sums)
            sums = tl.dot(high, _x_block(x, tokens, m, x_stride, columns + 64, first, stop, DT), sums)
    total = tl.sum(sums, axis=0)
    here = (tokens < m)[None, :]
    complete = True
    if SPLIT:
        own, parts = tl.load(job + 4), tl.load(job + 5)
        if parts > 1:
            size = m.to(tl.int64) * 16
            part_at = partial + tokens.to(tl.int64)[None, :] * 16 + ranks[:, None]
            tl.store(part_at + tl.program_id(0) * size, total, mask=here)
            tl.debug_barrier()  # every thread's sums are written before the count says so
            counter = counters + own * tl.num_programs(1) + tl.program_id(1)
            complete = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
            if complete:
                total = tl.zeros((16, BM), tl.float32)
                for index in range(parts):
                    total += tl.load(part_at + (own + index) * size, mask=here, other=0.0, cache_modifier=".cg")
                tl.atomic_xchg(counter, 0)
    if complete:
        column = tl.load(v_table + row + ranks)
        used = column >= 0
        column += tile * tl.load(v_table + v_rows + row + ranks)
        factor = tl.load(gain + column, mask=used, other=0.0) / u_step(BITS)
        z_at = z + tokens.to(tl.int64)[None, :] * z_stride + column[:, None]
        tl.store(z_at, (total * factor[:, None]).to(z.dtype.element_ty), mask=used[:, None] & here)
