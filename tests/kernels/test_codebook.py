# SPDX-License-Identifier: Apache-2.0
"""The levels of the codebooks, and that 16-bit kernels can hold them exactly."""

from fractions import Fraction
from typing import get_args

import pytest
import torch

from svsk_vllm.format import CODE_MAX, CODE_MIN, CODEBOOKS, Codebook, code_values, codebook_levels


def codes_of(codebook: str) -> range:
    return range(-128, 128) if codebook == "int8" else range(-8, 8)


def exact_levels(codebook: str) -> list[Fraction]:
    return [
        Fraction(q * (8 + abs(q)), 8) if codebook == "quad8" else Fraction(q)
        for q in codes_of(codebook)
    ]


def test_names_and_range_of_codes() -> None:
    assert get_args(Codebook) == CODEBOOKS == ("int4", "quad8", "int8")
    assert (CODE_MIN, CODE_MAX) == (-8, 7)


@pytest.mark.parametrize("codebook", get_args(Codebook))
def test_levels(codebook: Codebook) -> None:
    levels = codebook_levels(codebook)
    assert levels.dtype == torch.float32
    assert [Fraction(level) for level in levels.tolist()] == exact_levels(codebook)
    assert bool((levels[1:] > levels[:-1]).all())


@pytest.mark.parametrize("codebook", get_args(Codebook))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("code_dtype", [torch.int8, torch.int32, torch.float32])
def test_values_are_exact_in_every_dtype(
    codebook: Codebook, dtype: torch.dtype, code_dtype: torch.dtype
) -> None:
    codes = torch.tensor(codes_of(codebook), dtype=code_dtype).view(4, -1)
    values = code_values(codes, codebook, dtype)
    assert values.dtype == dtype
    assert values.shape == codes.shape
    assert [Fraction(value) for value in values.double().flatten().tolist()] == exact_levels(
        codebook
    )


def test_quad8_times_eight_fits_int8() -> None:
    scaled = [8 * level for level in exact_levels("quad8")]
    assert all(level.denominator == 1 for level in scaled)
    assert (int(min(scaled)), int(max(scaled))) == (-128, 105)
    assert codebook_levels("quad8").mul(8).to(torch.int8).tolist() == scaled
