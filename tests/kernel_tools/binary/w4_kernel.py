# SPDX-License-Identifier: Apache-2.0
"""A small 4-bit matrix product in Triton, for the tests of the inspection.

Good as it is, bad on request.
"""

import triton
import triton.language as tl


@triton.jit
def unpack(words, plane: tl.constexpr, convert: tl.constexpr):
    """Nibble ``plane`` of 16-bit words as float16, minus 8.

    Through the mantissa of 1024, or by a conversion.
    """
    nibbles = (words >> (4 * plane)) & 0xF
    if convert:
        return (nibbles.to(tl.int32) - 8).to(tl.float32).to(tl.float16)
    return (nibbles | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - 1032.0


@triton.jit
def w4_matmul(
    x_ptr,
    w_ptr,
    y_ptr,
    part_ptr,
    counter_ptr,
    m,
    n,
    k,
    stride_w,
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
    STAGES: tl.constexpr,  # noqa: N803
    DOT: tl.constexpr,  # noqa: N803
    CONVERT: tl.constexpr,  # noqa: N803
    RESULT: tl.constexpr,  # noqa: N803
    ORDER: tl.constexpr,  # noqa: N803
    ASSUME: tl.constexpr,  # noqa: N803
):
    """y [m, n] = x [m, k] W^T.

    Words [n, k/4] hold four planes of WORDS weights. RESULT: "store", "split", "atomic".
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    words = tl.arange(0, WORDS)
    inside = tokens < m
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * stride_w
    x_columns = x_ptr + tokens.to(tl.int64)[None, :] * k
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if ASSUME:  # else ptxas has each product on sm_90 wait for the one before
        tl.assume(tl.program_id(1) < k // (4 * WORDS))
    for block in tl.range(
        tl.program_id(1), k // (4 * WORDS), tl.num_programs(1), num_stages=STAGES
    ):
        packed = tl.load(w_rows + (block * WORDS + words)[None, :])
        for plane in tl.static_range(4):
            x = tl.load(
                x_columns + ((block * 4 + plane) * WORDS + words)[:, None],
                mask=inside[None, :],
                other=0.0,
            )
            w = unpack(packed, plane, CONVERT)
            if DOT:
                acc = tl.dot(w, x, acc)
            else:  # float32 at full precision is multiplied without tensor cores
                acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    result = tl.trans(acc)
    offsets = tokens.to(tl.int64)[:, None] * n + rows[None, :]
    if RESULT == "store":
        tl.store(y_ptr + offsets, result.to(tl.float16), mask=inside[:, None])
    elif RESULT == "atomic":
        tl.atomic_add(part_ptr + offsets, result, mask=inside[:, None])
    else:
        split, splits = tl.program_id(1), tl.num_programs(1)
        size = m.to(tl.int64) * n
        tl.store(part_ptr + split * size + offsets, result, mask=inside[:, None])
        tl.debug_barrier()
        counter = counter_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem=ORDER) == splits - 1:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in range(splits):
                total += tl.load(
                    part_ptr + i * size + offsets,
                    mask=inside[:, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(y_ptr + offsets, total.to(tl.float16), mask=inside[:, None])
            tl.atomic_xchg(counter, 0)
