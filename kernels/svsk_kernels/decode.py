# SPDX-License-Identifier: Apache-2.0
"""Few tokens: the packed weight is streamed once, and every code meets the tensor cores as an exact integer.

``acc[BN, BM] = W x^T``: the weight is the first operand, so that what was unpacked in registers stays there, and the
tokens are the short side. Products of one plane are scaled in float32 after their matrix product; with 64 tokens it
takes fewer instructions to scale the weights (``SCALE_WEIGHTS``). Where one block of
rows per program leaves the GPU idle, the columns are split as well: partial sums go to memory, and whichever program of
a block arrives last adds them in the order of the splits, so that every run gives the same bits.
"""

import triton
import triton.language as tl

from svsk_kernels.primitives import add_sidecar, group_scale, load_columns, unpack_codes

__all__ = ["decode_kernel"]


@triton.jit(do_not_specialize=["m"])
def decode_kernel(
    x,
    words,
    scale,
    bias,
    row_table,
    u,
    z,
    z_used,
    y,
    partial,
    counters,
    m,
    n,
    k,
    n_padded,
    x_stride,
    word_stride,
    z_stride,
    steps,
    steps_per_split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PLANE: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    SIDECAR_BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    QUAD8: tl.constexpr,
    DT: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y[m, n] = x W_hat^T + bias`` for one block of BN rows, one split of the columns and BM tokens.

    Grid: (padded N / BN, SPLIT, ceil(M / BM)). See :mod:`svsk_kernels.layout` for the tensors; ``steps`` counts
    runs of STEP words, STEP a divisor of PLANE and of GROUP. ``partial`` is float32 [SPLIT, M, padded N], ``counters``
    int32, zero before and after. ``SIDECAR_BITS`` 0 means no sidecar.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BN + tl.arange(0, BN)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    here = (tokens < m)[None, :]
    word_row = words + rows.to(tl.int64)[:, None] * word_stride + tl.arange(0, STEP)[None, :]
    x_row = x + tokens.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    first = split * steps_per_split
    for step in tl.range(first, tl.minimum(first + steps_per_split, steps), num_stages=STAGES):
        packed = tl.load(word_row + step * STEP, eviction_policy="evict_first")
        q0, q1, q2, q3 = unpack_codes(packed, DT, ASM, QUAD8)
        start = step // (PLANE // STEP) * (4 * PLANE) + step % (PLANE // STEP) * STEP  # first plane's column
        x0 = load_columns(x_row, start, k, here, DT, STEP, EVEN_K)
        x1 = load_columns(x_row, start + PLANE, k, here, DT, STEP, EVEN_K)
        x2 = load_columns(x_row, start + 2 * PLANE, k, here, DT, STEP, EVEN_K)
        x3 = load_columns(x_row, start + 3 * PLANE, k, here, DT, STEP, EVEN_K)
        scales = scale + rows
        s0 = group_scale(scales, start, n_padded, GROUP)
        if 4 * PLANE <= GROUP:  # the four planes share a scale
            acc += tl.dot(q3, x3, tl.dot(q2, x2, tl.dot(q1, x1, tl.dot(q0, x0)))) * s0.to(tl.float32)
        elif 2 * PLANE <= GROUP:
            s2 = group_scale(scales, start + 2 * PLANE, n_padded, GROUP)
            acc += tl.dot(q1, x1, tl.dot(q0, x0)) * s0.to(tl.float32)
            acc += tl.dot(q3, x3, tl.dot(q2, x2)) * s2.to(tl.float32)
        else:
            s1 = group_scale(scales, start + PLANE, n_padded, GROUP)
            s2 = group_scale(scales, start + 2 * PLANE, n_padded, GROUP)
            s3 = group_scale(scales, start + 3 * PLANE, n_padded, GROUP)
            if SCALE_WEIGHTS:
                acc = tl.dot(q0 * s0.to(DT), x0, acc)
                acc = tl.dot(q1 * s1.to(DT), x1, acc)
                acc = tl.dot(q2 * s2.to(DT), x2, acc)
                acc = tl.dot(q3 * s3.to(DT), x3, acc)
            else:
                acc += tl.dot(q0, x0) * s0.to(tl.float32)
                acc += tl.dot(q1, x1) * s1.to(tl.float32)
                acc += tl.dot(q2, x2) * s2.to(tl.float32)
                acc += tl.dot(q3, x3) * s3.to(tl.float32)
    if split == SPLIT - 1:
        if SIDECAR_BITS:
            if PDL:  # z comes from the kernel launched just before; all above ran beside it
                tl.extra.cuda.gdc_wait()
            acc = add_sidecar(acc, rows, tokens, m, n_padded, z_stride, row_table, u, z, z_used, SIDECAR_BITS, DT)
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    out = tl.trans(acc)
    inside = (tokens < m)[:, None] & (rows < n)[None, :]
    y_at = y + tokens.to(tl.int64)[:, None] * n + rows[None, :]
    if SPLIT == 1:
        tl.store(y_at, out.to(y.dtype.element_ty), mask=inside)
    else:
        part_at = partial + tokens.to(tl.int64)[:, None] * n_padded + rows[None, :]
        size = m.to(tl.int64) * n_padded
        tl.store(part_at + split * size, out, mask=(tokens < m)[:, None])
        tl.debug_barrier()  # every thread's partial sums are written before the count says so
        counter = counters + tl.program_id(2) * tl.num_programs(0) + block
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for index in range(SPLIT):
                # .cg: other programs wrote these, so the first-level cache must not answer
                total += tl.load(part_at + index * size, mask=(tokens < m)[:, None], other=0.0, cache_modifier=".cg")
            tl.store(y_at, total.to(y.dtype.element_ty), mask=inside)
            tl.atomic_xchg(counter, 0)
