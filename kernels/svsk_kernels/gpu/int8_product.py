# SPDX-License-Identifier: Apache-2.0
"""The product with a weight of 8-bit codes, for output heads.

Codes are multiplied as they are, exact in 16 bits, and every group's sums are scaled in float32:
only the activations and the result are rounded. A head is read once per token and multiplied with
few rows, so what counts is that it is read as 8 bits.

Checkpoint                          Run time
weight_packed  int32 [N, K / 4]     codes  int8 [N, K]
weight_scale   [N, K / group]       scale  [K / group, N]
"""

import triton
import triton.language as tl

__all__ = ["int8_kernel"]


@triton.jit(do_not_specialize=["m"])
def int8_kernel(
    # tensors
    x,  # [M, K] bf16 or fp16, rows x_stride apart
    codes,  # int8 [N, K], contiguous
    scale,  # [K / GROUP, N] bf16 or fp16, contiguous
    bias,  # [N] bf16 or fp16; None for none
    y,  # [M, N] bf16 or fp16, contiguous
    # sizes
    m,  # tokens M
    n,  # outputs N
    k,  # inputs K, whole groups
    x_stride,  # elements
    # blocks
    BLOCK_M: tl.constexpr,  # tokens per program
    BLOCK_N: tl.constexpr,  # outputs per program
    GROUP: tl.constexpr,  # weights per scale
    # how it is computed
    DTYPE: tl.constexpr,  # of the matrix products
    STAGES: tl.constexpr,  # groups whose loads are under way
):
    """``y[m, n] = x W^T + bias`` for one block of BLOCK_N rows and BLOCK_M tokens.

    Grid: (ceil(M / BLOCK_M), ceil(N / BLOCK_N)).
    """
    # neighbours in the first dimension share the weight's rows
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < m, offs_n < n
    offs_k = tl.arange(0, GROUP)
    code_at = codes + offs_n.to(tl.int64)[:, None] * k + offs_k[None, :]
    x_at = x + offs_m.to(tl.int64)[None, :] * x_stride + offs_k[:, None]
    scale_at = scale + offs_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(0, k // GROUP, num_stages=STAGES):
        q = tl.load(code_at, mask=mask_n[:, None], other=0).to(DTYPE)
        part = tl.load(x_at, mask=mask_m[None, :], other=0.0).to(DTYPE)
        factor = tl.load(scale_at, mask=mask_n, other=0.0).to(tl.float32)
        acc += tl.dot(q, part) * factor[:, None]
        code_at += GROUP
        x_at += GROUP
        scale_at += n
    if bias is not None:
        acc += tl.load(bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y_at = y + offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_at, tl.trans(acc).to(y.dtype.element_ty), mask=mask)
