# SPDX-License-Identifier: Apache-2.0
"""The emulator's floating-point instructions against exact fractions, rounded once."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.kernel_tools.emulator.ptx import apply

GENERATOR = np.random.default_rng(0)
FORMATS = {"f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BITS = {"f32": torch.int32, "f16": torch.int16, "bf16": torch.int16}


def rounded(value: Fraction, kind: str) -> float:
    """The nearest number of a format, ties to even."""
    precision, least, most = FORMATS[kind]
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    step = Fraction(2) ** (max(exponent, least) - precision + 1)
    result = round(value / step) * step
    return (
        float(result)
        if abs(result) < Fraction(2) ** (most + 1)
        else float("inf") * (1 if value > 0 else -1)
    )


def numbers(kind: str, count: int) -> torch.Tensor:
    """Finite numbers of a format.

    Any bits, small integers, and powers of two and their neighbours.
    """
    dtype = {torch.int16: np.int16, torch.int32: np.int32}[BITS[kind]]
    info = np.iinfo(dtype)
    bits = torch.from_numpy(
        GENERATOR.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    )
    values = bits.view(DTYPES[kind])
    third = count // 3
    values[:third] = torch.from_numpy(GENERATOR.integers(-300, 300, third)).to(DTYPES[kind])
    powers = torch.from_numpy(2.0 ** GENERATOR.integers(-12, 12, third)).to(DTYPES[kind])
    values[third : 2 * third] = powers
    values.view(BITS[kind])[third : third + third // 2] += 1
    return torch.where(values.isfinite(), values, torch.ones((), dtype=DTYPES[kind]))


FLOAT_OPERATIONS: dict[str, tuple[int, Callable[..., Fraction]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "fma.rn": (3, lambda a, b, c: a * b + c),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", FLOAT_OPERATIONS)
def test_float_arithmetic_rounds_once(name: str, kind: str) -> None:
    count, function = FLOAT_OPERATIONS[name]
    inputs = [numbers(kind, 960) for _ in range(count)]
    found = apply(f"{name}.{kind}", BITS[kind], *(one.view(BITS[kind]) for one in inputs)).view(
        DTYPES[kind]
    )
    exact = [
        function(*map(Fraction, values))
        for values in zip(*map(torch.Tensor.tolist, inputs), strict=True)
    ]
    assert found.tolist() == [rounded(value, kind) for value in exact]
    if kind != "f32":
        packed = [one.view(torch.int32) for one in inputs]
        pairs = apply(f"{name}.{kind}x2", torch.int32, *packed).view(DTYPES[kind])
        assert pairs.tolist() == found.tolist()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_fma_where_two_roundings_would_err(kind: str) -> None:
    """``1 + half a unit`` and a trace more or less, far below what the sum's format can hold."""
    precision = FORMATS[kind][0]
    tiny = 2.0**-12 if kind == "f16" else 2.0**-60  # times itself
    a = torch.tensor([tiny, tiny, -tiny, 0.0] * 8, dtype=DTYPES[kind])
    b = torch.tensor([tiny, -tiny, -tiny, 1.0] * 8, dtype=DTYPES[kind])
    c = torch.full((32,), 1.0, dtype=DTYPES[kind])
    found = apply(f"fma.rn.{kind}", BITS[kind], *(one.view(BITS[kind]) for one in (a, b, c))).view(
        DTYPES[kind]
    )
    assert found.tolist() == [1.0] * 32
    half = torch.full((32,), 1.0 + 2.0 ** (1 - precision), dtype=DTYPES[kind])  # odd last bit
    factor = torch.full((32,), 1.0 + 2.0 ** (1 - precision), dtype=DTYPES[kind])
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z)
        for x, y, z in zip(half.tolist(), factor.tolist(), a.tolist(), strict=True)
    ]
    found = apply(
        f"fma.rn.{kind}", BITS[kind], *(one.view(BITS[kind]) for one in (half, factor, a))
    )
    assert found.view(DTYPES[kind]).tolist() == [rounded(value, kind) for value in exact]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_conversions(kind: str) -> None:
    a, b = numbers("f32", 480), numbers("f32", 480)
    bits = a.view(torch.int32)
    found = apply(f"cvt.rn.{kind}.f32", torch.int16, bits).view(DTYPES[kind])
    assert found.tolist() == [rounded(Fraction(value), kind) for value in a.tolist()]
    both = (
        apply(f"cvt.rn.{kind}x2.f32", torch.int32, bits, b.view(torch.int32))
        .view(DTYPES[kind])
        .view(-1, 2)
    )
    assert both[:, 1].tolist() == found.tolist()  # the first operand is the upper half
    assert both[:, 0].tolist() == [rounded(Fraction(value), kind) for value in b.tolist()]
    finite = torch.where(found.isfinite(), found, torch.zeros((), dtype=found.dtype))
    assert torch.equal(
        apply(f"cvt.f32.{kind}", torch.int32, finite.view(torch.int16)).view(torch.float32),
        finite.float(),
    )
    nan = torch.full((32,), float("nan")).view(torch.int32)
    assert set(apply(f"cvt.rn.{kind}.f32", torch.int16, nan).tolist()) == {0x7FFF}
