# SPDX-License-Identifier: Apache-2.0
"""Packing of codes and sidecar factors: bit layout, inverse, refusals."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from svsk_vllm.format import SvskFormatError, pack_codes, pack_factors, unpack_codes, unpack_factors
from tests.support.format_builders import property_test


def code_matrices() -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda words: 8 * words))
    return shapes.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-8, 7)))


def nibble_loop(packed: np.ndarray) -> np.ndarray:
    """Unpack one nibble at a time from the bytes as they lie in a file."""
    rows, words = packed.shape
    raw = packed.astype("<i4").tobytes()
    codes = np.zeros((rows, words * 8), np.int8)
    for n in range(rows):
        for k in range(words * 8):
            byte = raw[(n * words * 8 + k) // 2]
            codes[n, k] = (byte >> 4 if k % 2 else byte & 15) - 8
    return codes


@property_test
@given(code_matrices())
def test_packed_codes_are_read_by_three_decoders(codes: np.ndarray) -> None:
    packed = pack_codes(torch.from_numpy(codes))
    k = codes.shape[1]
    assert packed.dtype == torch.int32
    assert packed.shape == (codes.shape[0], k // 8)
    assert np.array_equal(unpack_codes(packed, k).numpy(), codes)
    assert np.array_equal(unpack_from_int32(packed, 4, torch.Size(codes.shape)).numpy(), codes)
    assert np.array_equal(nibble_loop(packed.numpy()), codes)


@property_test
@given(
    hnp.arrays(
        np.int32,
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        elements=st.integers(-(2**31), 2**31 - 1),
    )
)
def test_every_word_is_a_valid_code_word(words: np.ndarray) -> None:
    codes = unpack_codes(torch.from_numpy(words), words.shape[1] * 8)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), nibble_loop(words))
    assert np.array_equal(pack_codes(codes).numpy(), words)


def test_pack_codes_of_a_view_that_is_not_contiguous() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)  # [3, 16]
    transposed = codes.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(pack_codes(transposed), pack_codes(codes))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), "Codes: expected an int8 matrix, got torch.int32"),
        (torch.zeros(8, dtype=torch.int8), r"\[8\]"),
        (torch.zeros(2, 8, 8, dtype=torch.int8), r"\[2, 8, 8\]"),
        (torch.zeros(2, 12, dtype=torch.int8), "K = 12 is not a multiple of 8"),
        (torch.full((1, 8), 8, dtype=torch.int8), "Codes span 8 to 8: expected -8 to 7"),
        (torch.full((1, 8), -9, dtype=torch.int8), "span -9 to -9: expected -8 to 7"),
    ],
)
def test_pack_codes_refuses(codes: torch.Tensor, message: str) -> None:
    with pytest.raises(SvskFormatError, match=message):
        pack_codes(codes)


@pytest.mark.parametrize(
    ("packed", "k", "message"),
    [
        (
            torch.zeros(2, 4, dtype=torch.int64),
            32,
            "Packed codes: expected an int32 matrix, got torch",
        ),
        (torch.zeros(4, dtype=torch.int32), 32, r"\[4\]"),
        (
            torch.zeros(2, 4, dtype=torch.int32),
            31,
            r"Packed codes of shape \[2, 4\] hold 32 columns, not 31",
        ),
        (torch.zeros(2, 4, dtype=torch.int32), 40, "hold 32 columns, not 40"),
    ],
)
def test_unpack_codes_refuses(packed: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(SvskFormatError, match=message):
        unpack_codes(packed, k)


@property_test
@given(
    hnp.arrays(
        np.int8,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
        elements=st.integers(-128, 127),
    )
)
def test_eight_bit_factors_are_stored_as_they_are(factors: np.ndarray) -> None:
    stored = pack_factors(torch.from_numpy(factors), 8)
    assert stored.dtype == torch.int8
    assert np.array_equal(stored.numpy(), factors)
    assert np.array_equal(unpack_factors(stored, 8).numpy(), factors)


@property_test
@given(
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=5).flatmap(
        lambda shape: hnp.arrays(np.int8, (*shape[:-1], 2 * shape[-1]), elements=st.integers(-8, 7))
    )
)
def test_four_bit_factors_low_nibble_first(factors: np.ndarray) -> None:
    stored = pack_factors(torch.from_numpy(factors), 4)
    assert stored.dtype == torch.uint8
    assert stored.shape == (*factors.shape[:-1], factors.shape[-1] // 2)
    for index in np.ndindex(factors.shape):
        byte = int(stored[(*index[:-1], index[-1] // 2)])
        assert (byte >> 4 * (index[-1] % 2) & 15) - 8 == factors[index]
    unpacked = unpack_factors(stored, 4)
    assert unpacked.dtype == torch.int8
    assert np.array_equal(unpacked.numpy(), factors)


def test_every_byte_is_a_valid_pair_of_four_bit_factors() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    factors = unpack_factors(stored, 4)
    assert factors.tolist() == [
        nibble - 8 for byte in range(256) for nibble in (byte & 15, byte >> 4)
    ]
    assert torch.equal(pack_factors(factors, 4), stored)


@pytest.mark.parametrize(
    ("factors", "bits", "message"),
    [
        (torch.zeros(2, 2), 8, "Sidecar factors: expected int8, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.uint8), 4, "torch.uint8"),
        (torch.zeros(2, 3, dtype=torch.int8), 4, r"\[2, 3\]: the last axis must be even"),
        (torch.full((2,), 8, dtype=torch.int8), 4, "4-bit sidecar factors span 8 to 8: expected"),
        (torch.full((2,), -9, dtype=torch.int8), 4, "span -9 to -9: expected -8 to 7"),
        (torch.zeros(2, dtype=torch.int8), 6, "6 bits: expected 4 or 8"),
    ],
)
def test_pack_factors_refuses(factors: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(SvskFormatError, match=message):
        pack_factors(factors, bits)


@pytest.mark.parametrize(
    ("dtype", "bits", "message"),
    [
        (torch.uint8, 8, "8-bit sidecar factors: expected int8, got torch.uint8"),
        (torch.int8, 4, "4-bit sidecar factors: expected uint8, got torch.int8"),
        (torch.int8, 2, "2 bits: expected 4 or 8"),
    ],
)
def test_unpack_factors_refuses(dtype: torch.dtype, bits: int, message: str) -> None:
    with pytest.raises(SvskFormatError, match=message):
        unpack_factors(torch.zeros(2, dtype=dtype), bits)
