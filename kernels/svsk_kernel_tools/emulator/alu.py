# SPDX-License-Identifier: Apache-2.0
"""Instructions from registers to registers of the same thread, for a block's threads at once.

A register is an array with one unsigned integer per thread (booleans for predicates); types are
views of it. An opcode is looked up whole, with all its modifiers: what is not in the table is not
supported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final

import numpy as np

from svsk_kernel_tools.emulator.floats import (
    add_to_odd,
    bf16_to_f64,
    f16_to_f64,
    f32_to_bf16,
    f64_to_bf16,
    f64_to_f16,
    fma_f32,
)

__all__ = ["OPERATIONS", "Array", "Compute", "Source", "unsigned"]

Array = np.ndarray[Any, Any]
Registers = list[Any]
Compute = Callable[[Registers], Any]


@dataclass(frozen=True)
class Source:
    """Where an operand lies among the registers, and its value if it is a constant."""

    slot: int
    constant: int | None = None


Maker = Callable[..., Compute]
OPERATIONS: Final[dict[str, Maker]] = {}
"""From an opcode to what makes a computation of its sources."""

_UNSIGNED: Final = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED: Final = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def unsigned(width: int) -> Any:
    """Dtype that registers of so many bits are kept in."""
    return _UNSIGNED[width]


def _of(function: Callable[..., Any]) -> Maker:
    """What applies ``function`` to the registers of its sources."""

    def make(*sources: Source) -> Compute:
        if len(sources) == 2:  # by far the most, and called once for each executed instruction
            i, j = sources[0].slot, sources[1].slot
            return lambda r: function(r[i], r[j])
        slots = [source.slot for source in sources]
        return lambda r: function(*[r[slot] for slot in slots])

    return make


def _as(dtype: Any, function: Callable[..., Any]) -> Callable[..., Array]:
    """A function of values of ``dtype``, one or more a register, as one of registers' bits."""

    def compute(*values: Array) -> Array:
        result: Array = function(*(value.view(dtype) for value in values)).view(values[0].dtype)
        return result

    return compute


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero; a division by zero, whose result PTX leaves open, gives all ones."""
    size = np.maximum(b.astype(np.int64), -b.astype(np.int64))
    safe = np.where(size == 0, 1, size)
    wide = a.astype(np.int64)
    result = np.sign(wide) * np.sign(b.astype(np.int64)) * (np.abs(wide) // safe)
    return np.where(b == 0, -1, result).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a.astype(np.int64) - _quotient(a, b).astype(np.int64) * b).astype(a.dtype)


def _wide(dtype: Any, double: Any) -> Callable[..., Array]:
    return lambda a, b: (a.view(dtype).astype(double) * b.view(dtype).astype(double)).view(
        _UNSIGNED[np.dtype(double).itemsize * 8]
    )


def _integers() -> None:
    for width in (16, 32, 64):
        s, u = _SIGNED[width], _UNSIGNED[width]
        for letter, dtype in (("s", s), ("u", u)):
            name = f"{letter}{width}"
            OPERATIONS[f"add.{name}"] = _of(np.add)
            OPERATIONS[f"sub.{name}"] = _of(np.subtract)
            OPERATIONS[f"mul.lo.{name}"] = _of(np.multiply)
            OPERATIONS[f"mad.lo.{name}"] = _of(lambda a, b, c: a * b + c)
            OPERATIONS[f"min.{name}"] = _of(_as(dtype, np.minimum))
            OPERATIONS[f"max.{name}"] = _of(_as(dtype, np.maximum))
        OPERATIONS[f"neg.s{width}"] = _of(_as(s, np.negative))
        OPERATIONS[f"abs.s{width}"] = _of(_as(s, np.abs))
        for letter in "bus":
            OPERATIONS[f"selp.{letter}{width}"] = _of(_select)
        OPERATIONS[f"shl.b{width}"] = _shift(np.left_shift, width, u)
        OPERATIONS[f"shr.u{width}"] = OPERATIONS[f"shr.b{width}"] = _shift(np.right_shift, width, u)
        OPERATIONS[f"shr.s{width}"] = _shift(np.right_shift, width, s)
    for letter, table in (("s", _SIGNED), ("u", _UNSIGNED)):
        for width in (16, 32):
            multiply = _wide(table[width], table[2 * width])
            OPERATIONS[f"mul.wide.{letter}{width}"] = _of(multiply)
            OPERATIONS[f"mad.wide.{letter}{width}"] = _of(
                lambda a, b, c, multiply=multiply: multiply(a, b) + c
            )
        high = _wide(table[32], table[64])
        OPERATIONS[f"mul.hi.{letter}32"] = _of(
            lambda a, b, high=high: (high(a, b) >> np.uint64(32)).astype(np.uint32)
        )
        OPERATIONS[f"div.{letter}32"] = _of(_as(table[32], _quotient))
        OPERATIONS[f"rem.{letter}32"] = _of(_as(table[32], _remainder))
    for kind in ("b16", "b32", "b64", "pred"):  # predicates are booleans: NumPy's work on both
        OPERATIONS[f"and.{kind}"] = _of(np.bitwise_and)
        OPERATIONS[f"or.{kind}"] = _of(np.bitwise_or)
        OPERATIONS[f"xor.{kind}"] = _of(np.bitwise_xor)
        OPERATIONS[f"not.{kind}"] = _of(np.invert)
    OPERATIONS["selp.f32"] = OPERATIONS["selp.f64"] = _of(_select)


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _shift(function: Any, width: int, dtype: Any) -> Maker:
    """Shifts by as much as the width or more give zero, or nothing but the sign."""
    u: Any = _UNSIGNED[width]

    def make(a: Source, b: Source) -> Compute:
        i, j = a.slot, b.slot
        if b.constant is not None and b.constant < width:
            count = dtype(b.constant)
            return lambda r: function(r[i].view(dtype), count).view(u)

        def compute(r: Registers) -> Any:
            value, by = r[i].view(dtype), r[j]
            result = function(value, np.minimum(by, width - 1).astype(dtype))
            beyond = (
                value >> dtype(width - 1) if dtype in _SIGNED.values() else np.zeros_like(value)
            )
            return np.where(by >= width, beyond, result).astype(dtype).view(u)

        return compute

    return make


def _comparisons() -> None:
    tests: dict[str, Any] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    tests |= {"gt": np.greater, "ge": np.greater_equal}
    unsigned_names = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    for width in (16, 32, 64):
        for name, test in tests.items():
            OPERATIONS[f"setp.{name}.s{width}"] = _of(_compare(test, _SIGNED[width]))
            OPERATIONS[f"setp.{name}.u{width}"] = _of(test)
        for name, test in unsigned_names.items():
            OPERATIONS[f"setp.{name}.u{width}"] = _of(test)
        OPERATIONS[f"setp.eq.b{width}"] = _of(np.equal)
        OPERATIONS[f"setp.ne.b{width}"] = _of(np.not_equal)
    for name, test in tests.items():
        ordered = _compare(test, np.float32)
        if name == "ne":  # NumPy's is true of what is not a number, as PTX's neu is
            OPERATIONS["setp.neu.f32"] = _of(ordered)
            OPERATIONS["setp.ne.f32"] = _of(_compare(lambda a, b: (a < b) | (a > b), np.float32))
        else:
            OPERATIONS[f"setp.{name}.f32"] = _of(ordered)
            loose = _compare(
                lambda a, b, test=test: test(a, b) | np.isnan(a) | np.isnan(b), np.float32
            )
            OPERATIONS[f"setp.{name}u.f32"] = _of(loose)
    OPERATIONS["setp.nan.f32"] = _of(_compare(lambda a, b: np.isnan(a) | np.isnan(b), np.float32))
    OPERATIONS["setp.num.f32"] = _of(
        _compare(lambda a, b: ~(np.isnan(a) | np.isnan(b)), np.float32)
    )


def _compare(test: Any, dtype: Any) -> Callable[..., Array]:
    def compute(a: Array, b: Array) -> Array:
        result: Array = test(a.view(dtype), b.view(dtype))
        return result

    return compute


def _bits() -> None:
    OPERATIONS["bfe.u32"] = _of(partial(_extract, signed=False))
    OPERATIONS["bfe.s32"] = _of(partial(_extract, signed=True))
    OPERATIONS["lop3.b32"] = _lop3
    OPERATIONS["prmt.b32"] = _prmt


def _extract(a: Array, b: Array, c: Array, signed: bool) -> Any:
    """Source of the rule for signs: PTX ISA, bfe."""
    start, length = (b & np.uint32(0xFF)).astype(np.int64), (c & np.uint32(0xFF)).astype(np.int64)
    value = (a.view(np.int32) if signed else a).astype(np.int64) >> np.minimum(start, 63)
    keep = np.minimum(length, 32)
    field = value & ((np.int64(1) << keep) - 1)
    if signed:
        last = np.minimum(start + length - 1, 31)
        sign = (a.astype(np.int64) >> np.maximum(last, 0)) & 1
        field = np.where((length > 0) & (sign == 1), field | (np.int64(-1) << keep), field)
    return field.astype(np.uint32)


def _lop3(a: Source, b: Source, c: Source, table: Source) -> Compute:
    i, j, k, code = a.slot, b.slot, c.slot, table.constant
    if code is None:
        raise ValueError("its table is not a constant")
    if code == 0xEA:  # by far the most frequent
        return lambda r: (r[i] & r[j]) | r[k]

    def compute(r: Registers) -> Any:
        result = np.zeros_like(r[i])
        for term in range(8):
            if code >> term & 1:
                x = r[i] if term & 4 else ~r[i]
                y = r[j] if term & 2 else ~r[j]
                z = r[k] if term & 1 else ~r[k]
                result |= x & y & z
        return result

    return compute


def _prmt(a: Source, b: Source, c: Source) -> Compute:
    i, j, k, code = a.slot, b.slot, c.slot, c.constant

    def pool(r: Registers) -> Array:
        return np.stack([r[i], r[j]], axis=1).view(np.uint8)

    if code is not None and not code & 0x8888:
        chosen = [code >> 4 * place & 7 for place in range(4)]
        return lambda r: pool(r).take(chosen, axis=1).view(np.uint32).ravel()

    def compute(r: Registers) -> Any:
        selector = (r[k][:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        chosen = np.take_along_axis(pool(r), (selector & np.uint32(7)).astype(np.int64), axis=1)
        signs = np.where(chosen & 0x80, np.uint8(0xFF), np.uint8(0))
        return (
            np.where(selector & np.uint32(8), signs, chosen)
            .astype(np.uint8)
            .view(np.uint32)
            .ravel()
        )

    return compute


def _floats() -> None:
    single: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for name, function in single.items():
        for suffix in (".f32", ".rn.f32", ".f32x2", ".rn.f32x2"):
            OPERATIONS[name + suffix] = _of(_as(np.float32, function))
    OPERATIONS["fma.rn.f32"] = OPERATIONS["fma.rn.f32x2"] = _of(_as(np.float32, fma_f32))
    # Rounded correctly here; approx may be off by 2 units in the last place.
    for kind in ("approx", "full", "rn"):
        OPERATIONS[f"div.{kind}.f32"] = _of(_as(np.float32, np.divide))
    OPERATIONS["neg.f32"] = _of(lambda a: a ^ np.uint32(0x80000000))
    OPERATIONS["sqrt.rn.f32"] = _of(_as(np.float32, np.sqrt))
    OPERATIONS["abs.f32"] = _of(lambda a: a & np.uint32(0x7FFFFFFF))
    OPERATIONS["min.f32"] = _of(_as(np.float32, np.fmin))
    OPERATIONS["max.f32"] = _of(_as(np.float32, np.fmax))
    half: dict[str, Any] = {"f16": (f16_to_f64, f64_to_f16), "bf16": (bf16_to_f64, f64_to_bf16)}
    for kind, (widen, narrow) in half.items():
        for suffix in ("", "x2"):
            _halves(kind + suffix, widen, narrow)


def _halves(name: str, widen: Any, narrow: Any) -> None:
    """Arithmetic of 16-bit floats, one or two to a register."""

    def lanes(function: Any) -> Callable[..., Array]:
        def compute(*values: Array) -> Array:
            result: Array = narrow(function(*(widen(value.view(np.uint16)) for value in values)))
            return result.view(values[0].dtype)

        return compute

    sign = 0x80008000 if name.endswith("x2") else 0x8000
    dtype: Any = np.uint32 if name.endswith("x2") else np.uint16
    for rounding in ("", ".rn"):
        OPERATIONS[f"add{rounding}.{name}"] = _of(lanes(add_to_odd))
        OPERATIONS[f"sub{rounding}.{name}"] = _of(lanes(lambda a, b: add_to_odd(a, -b)))
        OPERATIONS[f"mul{rounding}.{name}"] = _of(lanes(np.multiply))
    OPERATIONS[f"fma.rn.{name}"] = _of(lanes(lambda a, b, c: add_to_odd(a * b, c)))
    OPERATIONS[f"neg.{name}"] = _of(lambda a: a ^ dtype(sign))
    OPERATIONS[f"abs.{name}"] = _of(lambda a: a & ~dtype(sign))


def _conversions() -> None:
    for width in (8, 16, 32, 64):
        for letter, table in (("s", _SIGNED), ("u", _UNSIGNED)):
            for to, result in product((8, 16, 32, 64), "su"):
                change = _resize(table[width], width, to, result)
                OPERATIONS[f"cvt.{result}{to}.{letter}{width}"] = _of(change)
            if width in (16, 32):
                OPERATIONS[f"cvt.rn.f32.{letter}{width}"] = _of(_to_float(table[width]))
    OPERATIONS["cvt.f32.f16"] = _of(lambda a: a.view(np.float16).astype(np.float32).view(np.uint32))
    OPERATIONS["cvt.f32.bf16"] = _of(lambda a: a.astype(np.uint32) << np.uint32(16))
    OPERATIONS["cvt.rn.bf16.f32"] = _of(lambda a: f32_to_bf16(a.view(np.float32)))
    OPERATIONS["cvt.rn.f16.f32"] = _of(_single_to_half)
    OPERATIONS["cvt.rn.bf16x2.f32"] = _of(
        lambda a, b: _pack(f32_to_bf16(b.view("f4")), f32_to_bf16(a.view("f4")))
    )
    OPERATIONS["cvt.rn.f16x2.f32"] = _of(lambda a, b: _pack(_single_to_half(b), _single_to_half(a)))


def _single_to_half(a: Array) -> Array:
    return f64_to_f16(a.view(np.float32).astype(np.float64))


def _pack(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def _to_float(dtype: Any) -> Callable[..., Any]:
    return lambda a: a.view(dtype).astype(np.float32).view(np.uint32)


def _resize(source: Any, width: int, to: int, letter: str) -> Callable[..., Any]:
    """Integers cut off or extended by their own sign.

    Results of 8 bits are extended again to the register's 16.
    """

    def compute(a: Array) -> Any:
        value = a.astype(_UNSIGNED[width]).view(source)
        if to > 8:
            return value.astype(_UNSIGNED[to])
        return value.astype(_SIGNED[8] if letter == "s" else np.uint8).astype(np.uint16)

    return compute


for _fill in (_integers, _comparisons, _bits, _floats, _conversions):
    _fill()
