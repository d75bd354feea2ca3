# SPDX-License-Identifier: Apache-2.0
"""Device functions the kernels share.

Codes and factors to floating point, and the sidecar's second half.

``DTYPE`` is the dtype of the matrix products: that of the activations on a GPU, float32 in Triton's
interpreter, whose bfloat16 arithmetic is wrong. No integer is converted by a conversion instruction
(a quarter of the rate or less): its bits are put into the mantissa of a power of two that is large
enough, which is then subtracted. All results are exact. ``ASM`` packs two 16-bit lanes per register
with inline PTX; without it the codes go through float16 in plain Triton, for AMD (whose vector
units have no bfloat16), the interpreter, and as a check.
"""

import triton
import triton.language as tl

__all__ = [
    "add_sidecar",
    "group_scales",
    "join_planes",
    "load_columns",
    "load_planes",
    "load_scale_words",
    "narrow_factors",
    "place",
    "scale_codes",
    "scale_planes",
    "spread",
    "u_step",
    "unpack_codes",
    "wide_factors",
]

# Planes are unpacked in two halves: the second can then be unpacked while tensor cores multiply the
# first, and fewer registers are in use at a time.
#
# lop3 0xEA is (a & b) | c. 0x4300 is 128 in bfloat16, whose last bit is worth 1: or-ing u = q + 8
# into it gives 128 + u, and a fused multiply-add by one (there is no bfloat16 addition before
# sm_90) takes 136 off.
_LOW_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 w1, one, bias;
    mov.b32 one, 0x3F803F80;
    mov.b32 bias, 0xC308C308;
    shr.u32 w1, $2, 4;
    lop3.b32 $0, $2, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, w1, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, bias;
    fma.rn.bf16x2 $1, $1, one, bias;
    }""")

_HIGH_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 w2, w3, one, bias;
    mov.b32 one, 0x3F803F80;
    mov.b32 bias, 0xC308C308;
    shr.u32 w2, $2, 8;
    shr.u32 w3, $2, 12;
    lop3.b32 $0, w2, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, w3, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, bias;
    fma.rn.bf16x2 $1, $1, one, bias;
    }""")

# 0x6400 is 1024 in float16, last bit 1. Odd nibbles stay where they are, 1024 + 16 u, which saves
# their shifts: times 1/16 less 72 is u - 8.
_LOW_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 bias, sixteenth, bias16;
    mov.b32 bias, 0x64086408;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 bias16, 0xD480D480;
    lop3.b32 $0, $2, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $1, $2, 0x00F000F0, 0x64006400, 0xEA;
    sub.f16x2 $0, $0, bias;
    fma.rn.f16x2 $1, $1, sixteenth, bias16;
    }""")

_HIGH_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 high, bias, sixteenth, bias16;
    mov.b32 bias, 0x64086408;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 bias16, 0xD480D480;
    shr.u32 high, $2, 8;
    lop3.b32 $0, high, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $1, high, 0x00F000F0, 0x64006400, 0xEA;
    sub.f16x2 $0, $0, bias;
    fma.rn.f16x2 $1, $1, sixteenth, bias16;
    }""")

# quad8: c = q (1 + |q| / 8). 1 + |q| / 8 and the product are exact; adding -0 makes a product of
# the fma.
_QUAD8_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 size, one, eighth, zero;
    mov.b32 one, 0x3F803F80;
    mov.b32 eighth, 0x3E003E00;
    mov.b32 zero, 0x80008000;
    and.b32 size, $1, 0x7FFF7FFF;
    fma.rn.bf16x2 size, size, eighth, one;
    fma.rn.bf16x2 $0, $1, size, zero;
    }""")

_QUAD8_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 size, one, eighth;
    mov.b32 one, 0x3C003C00;
    mov.b32 eighth, 0x30003000;
    and.b32 size, $1, 0x7FFF7FFF;
    fma.rn.f16x2 size, size, eighth, one;
    mul.rn.f16x2 $0, $1, size;
    }""")


# 0x4B000000 is 2**23 in float32, whose last bit is worth 1: each byte of a word into a mantissa.
_SCALE_BYTES: tl.constexpr = tl.constexpr("""{
    prmt.b32 $0, $4, 0x4B000000, 0x7440;
    prmt.b32 $1, $4, 0x4B000000, 0x7441;
    prmt.b32 $2, $4, 0x4B000000, 0x7442;
    prmt.b32 $3, $4, 0x4B000000, 0x7443;
    }""")


@triton.jit
def _exact(value, DTYPE: tl.constexpr):
    """Float16 or float32 values that DTYPE can represent, in DTYPE.

    For bfloat16 it is the upper half of the float32: there is nothing to round.
    """
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def _signed(bits, OFFSET: tl.constexpr):
    """``bits - OFFSET`` as float16, for uint16 bits below 1024."""
    return (bits | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + OFFSET)


@triton.jit
def _level(bits, DTYPE: tl.constexpr, QUAD8: tl.constexpr):
    """Level in DTYPE of codes stored as ``q + 8``, uint16."""
    q = _signed(bits, 8)
    if QUAD8:
        q = q * (tl.abs(q) * 0.125 + 1.0)
    return _exact(q, DTYPE)


@triton.jit
def _quad8(q, DTYPE: tl.constexpr):
    """Levels of the codebook quad8 for exact codes q of dtype DTYPE, by inline PTX."""
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _QUAD8_BF16, "=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:  # noqa: RET505 - the branches are compile-time, and their results have different types
        return tl.inline_asm_elementwise(
            _QUAD8_FP16, "=r,r", [q], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def _two_planes_bf16(words, CODE: tl.constexpr):
    """Codes of two of the four planes of a tile of int16 words, by inline PTX: exact."""
    return tl.inline_asm_elementwise(
        CODE, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
    )


@triton.jit
def _two_planes_fp16(words, CODE: tl.constexpr):
    """Likewise."""
    return tl.inline_asm_elementwise(
        CODE, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )


@triton.jit
def unpack_codes(words, DTYPE: tl.constexpr, ASM: tl.constexpr, QUAD8: tl.constexpr):
    """The four planes of a tile of int16 words, each of its shape.

    Codebook levels, exact in DTYPE.
    """
    if ASM:
        if DTYPE == tl.bfloat16:
            q0, q1 = _two_planes_bf16(words, _LOW_BF16)
            q2, q3 = _two_planes_bf16(words, _HIGH_BF16)
        else:
            q0, q1 = _two_planes_fp16(words, _LOW_FP16)
            q2, q3 = _two_planes_fp16(words, _HIGH_FP16)
        if QUAD8:
            q0 = _quad8(q0, DTYPE)
            q1 = _quad8(q1, DTYPE)
            q2 = _quad8(q2, DTYPE)
            q3 = _quad8(q3, DTYPE)
    else:
        bits = words.to(tl.uint16, bitcast=True)
        q0 = _level(bits & 15, DTYPE, QUAD8)
        q1 = _level((bits >> 4) & 15, DTYPE, QUAD8)
        q2 = _level((bits >> 8) & 15, DTYPE, QUAD8)
        q3 = _level(bits >> 12, DTYPE, QUAD8)
    return q0, q1, q2, q3


@triton.jit
def wide_factors(stored, DTYPE: tl.constexpr):
    """8-bit factors, given as uint8, in DTYPE: exact."""
    return _exact(_signed((stored ^ 0x80).to(tl.uint16), 128), DTYPE)


@triton.jit
def narrow_factors(stored, DTYPE: tl.constexpr):
    """Low and high 4-bit factors of bytes, in DTYPE: exact."""
    bits = stored.to(tl.uint16)
    return _exact(_signed(bits & 15, 8), DTYPE), _exact(_signed(bits >> 4, 8), DTYPE)


@triton.jit
def u_step(BITS: tl.constexpr):
    """Power of two that U is taken in and z over: it keeps z in the range of outputs (float16)."""
    return 0.0078125 if BITS == 8 else 0.125


@triton.jit
def place(pointer, first, rows, stride, columns, NARROW: tl.constexpr):
    """A block's elements as a pointer and offsets, to whose sum a turn's own offset is added.

    ``NARROW``: one pointer for all and offsets of 32 bits, which take half the registers and let
    a turn add the same number to them all. Else pointers of 64 bits each, and no offsets, which
    takes fewer instructions.

    Args:
        pointer: to the first element of all.
        first: row at which the block begins.
        rows: int32 of the block's shape, or one that broadcasts: rows from there.
        stride: elements between rows.
        columns: likewise: columns.
        NARROW: see above; offsets within the block are then less than 2**31.
    """
    if NARROW:
        return pointer + tl.cast(first, tl.int64) * stride, rows * stride + columns
    else:  # noqa: RET505 - the branches are compile-time, and their results have different types
        return pointer + (first + rows).to(tl.int64) * stride + columns, 0


@triton.jit
def group_scales(
    scales,  # pointers [BLOCK_N] to the rows' first scales, or their first with NARROW
    offs,  # with NARROW offsets [BLOCK_N] of the others
    start,  # column of the first plane
    n_padded,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Scales [BLOCK_N, 1] of the groups that the four planes' columns lie in.

    They are loaded as one tile: threads then copy two rows and more of 16 bits each, which the
    compiler can do ahead of time, as it cannot with single ones.
    """
    groups = (start + tl.arange(0, 4) * PLANE) // GROUP
    rows: tl.constexpr = offs.shape[0] if NARROW else scales.shape[0]
    if NARROW:
        tile = tl.load(scales + (offs[None, :] + groups[:, None] * n_padded))
    else:
        tile = tl.load(scales[None, :] + groups.to(tl.int64)[:, None] * n_padded)
    even, odd = tl.split(tl.reshape(tl.trans(tile), (rows, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return s0[:, None], s1[:, None], s2[:, None], s3[:, None]


@triton.jit
def load_scale_words(
    scales,  # pointers [BLOCK_N] to the rows' first scale words, or their first with NARROW
    offs,  # with NARROW offsets [BLOCK_N] of the others
    turn,  # which turn of WORDS words of codes
    n_padded,
    WORDS: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Scale words [BLOCK_N, runs] of WORDS words of codes, see ``pack_scale_codes``."""
    run: tl.constexpr = PLANE if PLANE < GROUP else GROUP
    runs: tl.constexpr = WORDS // run if WORDS > run else 1
    first = turn * runs if WORDS >= run else turn // (run // WORDS)
    index = first + tl.arange(0, runs)
    if NARROW:
        at = scales + (offs[:, None] + index[None, :] * n_padded)
    else:
        at = scales[:, None] + index.to(tl.int64)[None, :] * n_padded
    return tl.load(at)


@triton.jit
def scale_codes(words, ASM: tl.constexpr):
    """Codes of the scales of the four planes, float32 and of the shape of ``words``: exact.

    Words of two bytes serve two planes with each, those of one byte all four.
    """
    if ASM:
        b0, b1, b2, b3 = tl.inline_asm_elementwise(
            _SCALE_BYTES,
            "=&r,=&r,=&r,=&r,r",
            [words.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        wide = words.to(tl.int32)
        b0 = (wide & 255) | 0x4B000000
        b1 = ((wide >> 8) & 255) | 0x4B000000
        b2 = ((wide >> 16) & 255) | 0x4B000000
        b3 = ((wide >> 24) & 255) | 0x4B000000
    if words.dtype == tl.int8:
        b1, b2, b3 = b0, b0, b0
    elif words.dtype == tl.int16:
        b1, b2, b3 = b0, b1, b1
    return _scale_code(b0), _scale_code(b1), _scale_code(b2), _scale_code(b3)


@triton.jit
def _scale_code(bits):
    """Code of a scale, float32, given as ``code + 128`` in the mantissa of 2**23."""
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)


@triton.jit
def spread(values, COLUMNS: tl.constexpr):
    """Values [rows, runs] over the columns of their runs: [rows, COLUMNS], or [rows, 1] of one."""
    rows: tl.constexpr = values.shape[0]
    runs: tl.constexpr = values.shape[1]
    if runs > 1:
        wide = tl.broadcast_to(values[:, :, None], (rows, runs, COLUMNS // runs))
        values = tl.reshape(wide, (rows, COLUMNS))
    return values


@triton.jit
def scale_planes(q0, q1, q2, q3, words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Levels of four planes times their scales' codes, rounded once to DTYPE.

    At most 16 * 128: far from what overflows float16.
    """
    columns: tl.constexpr = q0.shape[1]
    c0, c1, c2, c3 = scale_codes(words, ASM)
    q0 = q0 * spread(_exact(c0, DTYPE), columns)
    q1 = q1 * spread(_exact(c1, DTYPE), columns)
    q2 = q2 * spread(_exact(c2, DTYPE), columns)
    q3 = q3 * spread(_exact(c3, DTYPE), columns)
    return q0, q1, q2, q3


@triton.jit
def load_columns(
    x_row, at, k, mask_m, DTYPE: tl.constexpr, STEP: tl.constexpr, EVEN_K: tl.constexpr
):
    """Activations [STEP, BLOCK_M] of STEP columns from ``at``.

    Zero beyond ``k`` and outside ``mask_m`` [1, BLOCK_M].
    """
    columns = at + tl.arange(0, STEP)
    mask = mask_m if EVEN_K else mask_m & (columns < k)[:, None]
    return tl.load(x_row + columns[:, None], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_planes(
    x,  # pointer to the block's first token
    offs,  # int32 [1, BLOCK_M]: elements from there to each token
    start,
    k,
    DTYPE: tl.constexpr,
    PLANE: tl.constexpr,
    STEP: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Activations [4 * STEP, BLOCK_M] of STEP columns of each plane, in the order of the planes.

    Zero beyond ``k``. Tokens are not masked: where there are none, ``offs`` is that of another.
    """
    planes = tl.arange(0, 4)[:, None] * PLANE + tl.arange(0, STEP)[None, :]
    columns = tl.reshape(planes, (4 * STEP,))
    at = x + ((offs + columns[:, None]) + start)
    if EVEN_K:
        return tl.load(at).to(DTYPE)
    return tl.load(at, mask=(start + columns < k)[:, None], other=0.0).to(DTYPE)


@triton.jit
def join_planes(w0, w1, w2, w3):
    """Weights of four planes [BLOCK_N, STEP] beside each other, [BLOCK_N, 4 * STEP].

    Only names of registers change. One product of all columns waits for the tensor cores once,
    where one of each plane would wait four times.
    """
    rows: tl.constexpr = w0.shape[0]
    step: tl.constexpr = w0.shape[1]
    left = tl.reshape(tl.permute(tl.join(w0, w1), (0, 2, 1)), (rows, 2 * step))
    right = tl.reshape(tl.permute(tl.join(w2, w3), (0, 2, 1)), (rows, 2 * step))
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (rows, 4 * step))


@triton.jit
def add_sidecar(
    acc,  # float32 [BLOCK_N, BLOCK_M]
    offs_n,  # int32 [BLOCK_N]: outputs
    offs_m,  # int32 [BLOCK_M]: tokens
    m,  # tokens M
    n_padded,  # N padded to whole blocks
    z_stride,  # the number of z columns
    row_table,  # int32 [3, padded N]: first byte of U, first z column, end of the z columns
    u,  # uint8, flat
    z,  # [M, z columns] bf16 or fp16
    z_used,  # uint8 [z columns]: 0 in padding
    share,  # which of SHARES this program adds
    BITS: tl.constexpr,  # of the factors: 8 or 4
    DTYPE: tl.constexpr,  # of the matrix products
    SHARES: tl.constexpr,  # programs among which the z columns are dealt out, 32 at a time
):
    """``acc`` and a share of ``U z`` for a block of rows, [BLOCK_N, BLOCK_M].

    The rows may belong to several slots, or to none.

    z holds ``gain * (V x) / u_step(BITS)``, see :mod:`svsk_kernels.gpu.shrink`.
    """
    # each row's U and z columns; all three are multiples of 16, which makes wide copies possible
    at = tl.multiple_of(tl.load(row_table + offs_n), 16)
    first = tl.multiple_of(tl.load(row_table + n_padded + offs_n), 16)
    last = tl.multiple_of(tl.load(row_table + 2 * n_padded + offs_n), 16)
    # a power of two: factors times it are exact
    unit = tl.full((1, 1), u_step(BITS), DTYPE)
    half, mask_m = tl.arange(0, 16), (offs_m < m)[None, :]
    z_row = z + offs_m.to(tl.int64)[None, :] * z_stride
    # all z columns that any of these rows takes, 32 at a time: what 16 bytes of 4-bit factors hold.
    # A row's factors are zero outside its own columns
    for start in range(tl.min(first) + share * 32, tl.max(last), 32 * SHARES):
        column = start // 16 * 16  # says so to the compiler
        if BITS == 8:
            columns = column + tl.arange(0, 32)
            # U of these rows, z of these columns (zero in padding, where z holds anything)
            inside = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
            factors = tl.load(u + (at - first)[:, None] + columns[None, :], mask=inside, other=0)
            valid = tl.load(z_used + columns, mask=columns < z_stride, other=0) != 0
            values = tl.load(z_row + columns[:, None], mask=valid[:, None] & mask_m, other=0.0)
            acc = tl.dot(wide_factors(factors, DTYPE) * unit, values.to(DTYPE), acc)
        else:
            inside = ((column >= first) & (column < last))[:, None]
            # U: a byte holds the z columns c and c + 16
            byte = at + (column - first) // 2
            u_row = u + tl.multiple_of(byte, 16)[:, None]
            factors = tl.load(u_row + half[None, :], mask=inside, other=0x88)  # two zeros
            low, high = narrow_factors(factors, DTYPE)
            # z of the first 16 columns, then of the second
            columns = column + half
            valid = tl.load(z_used + columns) != 0
            values = tl.load(z_row + columns[:, None], mask=valid[:, None] & mask_m, other=0.0)
            values = values.to(DTYPE)
            acc = tl.dot(low * unit, values, acc)
            columns = columns + 16
            valid = tl.load(z_used + columns) != 0
            values = tl.load(z_row + columns[:, None], mask=valid[:, None] & mask_m, other=0.0)
            values = values.to(DTYPE)
            acc = tl.dot(high * unit, values, acc)
    return acc
