# SPDX-License-Identifier: Apache-2.0
"""Floating-point arithmetic with the roundings that PTX asks for.

One per instruction, to nearest even.

Sums are formed in float64 and rounded to odd where they do not fit: the last bit then says that
something was cut off, and a second rounding to half the bits or fewer is as good as one (Boldo and
Melquiond, "Emulation of FMA and correctly rounded sums", 2008). Subnormal numbers are kept, as PTX
does without ``.ftz``. A 16-bit result that is not a number is 0x7FFF, as PTX says; the bits of a
float32 one are not modelled.
"""

import numpy as np
import numpy.typing as npt

__all__ = [
    "add_to_odd",
    "bf16_to_f64",
    "f16_to_f64",
    "f32_to_bf16",
    "f64_to_bf16",
    "f64_to_f16",
    "fma_f32",
]

Bits16 = npt.NDArray[np.uint16]
Double = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]


def bf16_to_f64(bits: Bits16) -> Double:
    """Values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def f16_to_f64(bits: Bits16) -> Double:
    """Values of float16 bits."""
    return bits.view(np.float16).astype(np.float64)


def f32_to_bf16(value: Single) -> Bits16:
    """Bits of the nearest bfloat16, ties to even."""
    bits = value.view(np.uint32)
    rounded = (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def f64_to_bf16(value: Double) -> Bits16:
    """Bits of the nearest bfloat16, ties to even, by way of a float32 rounded to odd."""
    near = value.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    move = (back != value) & ((bits & np.uint32(1)) == 0) & ~np.isnan(value)
    if move.any():
        outwards = np.abs(value) > np.abs(back)
        bits = np.where(move, np.where(outwards, bits + np.uint32(1), bits - np.uint32(1)), bits)
    return f32_to_bf16(bits.view(np.float32))


def f64_to_f16(value: Double) -> Bits16:
    """Bits of the nearest float16, ties to even: NumPy rounds once."""
    return np.where(np.isnan(value), np.uint16(0x7FFF), value.astype(np.float16).view(np.uint16))


def add_to_odd(a: Double, b: Double) -> Double:
    """``a + b`` in float64, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # exact: Knuth's TwoSum
    bits = total.view(np.int64)
    move = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    if not move.any():
        return total
    outwards = (error > 0) == (total > 0)
    return np.where(move, np.where(outwards, bits + 1, bits - 1), bits).view(np.float64)


def fma_f32(a: Single, b: Single, c: Single) -> Single:
    """``a * b + c`` with one rounding; the product of two float32 is exact in float64."""
    return add_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(
        np.float32
    )
