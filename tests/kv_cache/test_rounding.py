# SPDX-License-Identifier: Apache-2.0
"""Token-by-token forms against the engines' own arithmetic, written down a second time."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache.rounding import Rounding, int4, q4_0, q4_1, q8_0, rotated
from tests.kv_cache.plain import plain_int4_codes

FloatArray = npt.NDArray[np.float32]

LLAMA_CPP = {
    GGMLQuantizationType.Q8_0: q8_0,
    GGMLQuantizationType.Q4_0: q4_0,
    GGMLQuantizationType.Q4_1: q4_1,
}


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers with some large channels, a block of zeros and one of equal numbers."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    numbers[..., 3] = numbers[..., 3] * 40 + 150
    numbers[..., 0, :] = 0
    numbers[..., 1, :] = -2.5
    return numbers


@pytest.mark.parametrize("kind", LLAMA_CPP, ids=lambda kind: kind.name)
@pytest.mark.parametrize("width", [32, 64, 96])
def test_llama_cpps_types_are_those_of_its_own_package(
    kind: GGMLQuantizationType, width: int
) -> None:
    numbers = states(2, 3, 17, width)
    stored = quants.quantize(numbers.numpy(), kind)
    expected = torch.from_numpy(quants.dequantize(stored, kind))
    assert torch.equal(LLAMA_CPP[kind](numbers), expected)
    half = numbers.bfloat16()
    stored = quants.quantize(half.float().numpy(), kind)
    expected = torch.from_numpy(quants.dequantize(stored, kind)).bfloat16()
    assert torch.equal(LLAMA_CPP[kind](half), expected)


def hadamard(size: int) -> npt.NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize(
    ("width", "whole_head", "size"), [(64, True, 64), (64, False, 64), (128, True, 128)]
)
def test_rotated(width: int, whole_head: bool, size: int) -> None:
    numbers = states(5, 7, width)
    matrix = torch.from_numpy(hadamard(size)).float() / math.sqrt(size)
    stored = q4_0((numbers.unflatten(-1, (-1, size)) @ matrix).flatten(-2))
    expected = (stored.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    # The order of sums differs, and a number at a border of two codes may take the other.
    error = (rotated(q4_0, numbers, whole_head=whole_head) - expected).abs()
    assert float((error > 1e-3).float().mean()) < 0.01
    assert not torch.allclose(expected, q4_0(numbers), atol=0.1), "a rotation that changes nothing"


def test_values_are_rotated_by_64_and_keys_as_a_whole() -> None:
    numbers = states(3, 5, 192)
    parts = numbers.unflatten(-1, (3, 64))
    by_parts = rotated(q8_0, parts, whole_head=True).flatten(-2)
    assert torch.equal(rotated(q8_0, numbers, whole_head=True), by_parts), "192 = 3 x 64"
    numbers = states(3, 5, 128)
    by_parts = rotated(q8_0, numbers.unflatten(-1, (2, 64)), whole_head=True).flatten(-2)
    assert torch.equal(rotated(q8_0, numbers, whole_head=False), by_parts)
    assert not torch.equal(rotated(q8_0, numbers, whole_head=True), by_parts)


def plain_int4(row: FloatArray) -> FloatArray:
    """vLLM's int4_per_token_head of one head of one token, step by step."""
    size = len(row) & -len(row)
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator).numpy() - 1
    matrix = hadamard(size)
    turned = np.concatenate([matrix @ (part * signs) for part in row.reshape(-1, size)])
    back = plain_int4_codes(turned.astype(np.float32))
    parts = [matrix @ part / size * signs for part in back.reshape(-1, size)]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("width", [64, 96])
def test_int4_is_vllms(width: int) -> None:
    numbers = states(2, 9, width, seed=1)
    expected = [plain_int4(row) for row in numbers.flatten(0, 1).numpy()]
    error = (int4(numbers).flatten(0, 1) - torch.from_numpy(np.array(expected))).abs()
    # one code of a rotated number, spread over the head, where float32 and float64 part at a border
    assert float((error > 1e-3).any(-1).float().mean()) < 0.1
    assert torch.equal(int4(numbers)[:, :1], torch.zeros(2, 1, width))


def test_int4_needs_no_blocks_of_32() -> None:
    numbers = states(4, 80)
    assert int4(numbers).shape == numbers.shape
    assert float((int4(numbers) - numbers).abs().mean()) < float(numbers.abs().mean()) / 3


@pytest.mark.parametrize("rounding", [q8_0, q4_0, q4_1])
def test_heads_that_are_no_blocks_are_refused(rounding: Rounding) -> None:
    with pytest.raises(SvskError, match=r"80 channels, llama.cpp's types store blocks of 32"):
        rounding(torch.zeros(2, 80))
    with pytest.raises(SvskError, match=r"96 channels, llama.cpp rotates multiples of 64 only"):
        rotated(rounding, torch.zeros(2, 96), whole_head=True)
