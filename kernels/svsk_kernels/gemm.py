# SPDX-License-Identifier: Apache-2.0
"""More tokens than decode, fewer than pay for writing the weight out: large blocks, weights scaled in registers.

Each weight is multiplied by its scale once (half an instruction) instead of each partial sum, which decode does because
it has few of them. Programs are numbered so that those running together share blocks of rows: the packed weight is read
from memory once, and from the second-level cache for every further block of tokens.
"""

import triton
import triton.language as tl

from svsk_kernels.primitives import add_sidecar, group_scale, load_columns, unpack_codes

__all__ = ["gemm_kernel"]


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x,
    words,
    scale,
    bias,
    row_table,
    u,
    z,
    z_used,
    y,
    m,
    n,
    k,
    n_padded,
    x_stride,
    word_stride,
    z_stride,
    steps,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PLANE: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SIDECAR_BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    QUAD8: tl.constexpr,
    DT: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y[m, n] = x W_hat^T + bias`` for one block of BN rows and BM tokens; grid (ceil(M / BM), padded N / BN).

    Arguments as for :func:`svsk_kernels.decode.decode_kernel`.
    """
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    here = (tokens < m)[None, :]
    word_row = words + rows.to(tl.int64)[:, None] * word_stride + tl.arange(0, STEP)[None, :]
    x_row = x + tokens.to(tl.int64)[None, :] * x_stride
    scales = scale + rows
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        q0, q1, q2, q3 = unpack_codes(tl.load(word_row + step * STEP), DT, ASM, QUAD8)
        start = step // (PLANE // STEP) * (4 * PLANE) + step % (PLANE // STEP) * STEP  # first plane's column
        x0 = load_columns(x_row, start, k, here, DT, STEP, EVEN_K)
        x1 = load_columns(x_row, start + PLANE, k, here, DT, STEP, EVEN_K)
        x2 = load_columns(x_row, start + 2 * PLANE, k, here, DT, STEP, EVEN_K)
        x3 = load_columns(x_row, start + 3 * PLANE, k, here, DT, STEP, EVEN_K)
        acc = tl.dot(q0 * group_scale(scales, start, n_padded, GROUP).to(DT), x0, acc)
        acc = tl.dot(q1 * group_scale(scales, start + PLANE, n_padded, GROUP).to(DT), x1, acc)
        acc = tl.dot(q2 * group_scale(scales, start + 2 * PLANE, n_padded, GROUP).to(DT), x2, acc)
        acc = tl.dot(q3 * group_scale(scales, start + 3 * PLANE, n_padded, GROUP).to(DT), x3, acc)
    if SIDECAR_BITS:
        acc = add_sidecar(acc, rows, tokens, m, n_padded, z_stride, row_table, u, z, z_used, SIDECAR_BITS, DT)
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    inside = (tokens < m)[:, None] & (rows < n)[None, :]
    y_at = y + tokens.to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(y_at, tl.trans(acc).to(y.dtype.element_ty), mask=inside)
