# SPDX-License-Identifier: Apache-2.0
"""Packing of codes and sidecar factors.

Codes use compressed-tensors' ``pack-quantized`` layout, by its own functions. They are imported
inside the functions because importing compressed-tensors imports transformers, which takes seconds.
"""

import torch

from svsk_kernels.codebook import CODE_MAX, CODE_MIN
from svsk_vllm.format.errors import SvskFormatError

__all__ = ["pack_codes", "pack_factors", "unpack_codes", "unpack_factors"]

_WORD_BITS = 32


def pack_codes(codes: torch.Tensor, num_bits: int = 4) -> torch.Tensor:
    """Pack codes into words along K, the first in the lowest bits.

    Args:
        codes: int8 [N, K], values of ``num_bits`` bits and a sign, each stored with half their
            range added (``q + 8``, ``q + 128``); K a multiple of what a word holds.
        num_bits: 4, eight to a word, or 8, four to a word.

    Returns:
        int32 [N, K * num_bits / 32].

    Raises:
        SvskFormatError: wrong dtype or shape, or a value out of range.
    """
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise SvskFormatError(
            f"Codes: expected an int8 matrix, got {codes.dtype} of shape {list(codes.shape)}."
        )
    per_word, half = _WORD_BITS // num_bits, 1 << num_bits - 1
    if codes.shape[1] % per_word:
        raise SvskFormatError(
            f"Codes of shape {list(codes.shape)}: K = {codes.shape[1]} is not a multiple of"
            f" {per_word}."
        )
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise SvskFormatError(
            f"Codes span {int(codes.min())} to {int(codes.max())}: expected {-half} to {half - 1}."
        )
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: torch.Tensor = pack_to_int32(codes, num_bits)
    return packed


def unpack_codes(packed: torch.Tensor, k: int, num_bits: int = 4) -> torch.Tensor:
    """Inverse of :func:`pack_codes`: int32 [N, K * num_bits / 32] to int8 [N, ``k``].

    Raises:
        SvskFormatError: wrong dtype, or ``k`` does not fit the number of words.
    """
    if packed.dtype != torch.int32 or packed.ndim != 2:
        raise SvskFormatError(
            f"Packed codes: expected an int32 matrix, got {packed.dtype} of shape"
            f" {list(packed.shape)}."
        )
    if packed.shape[1] * (_WORD_BITS // num_bits) != k:
        raise SvskFormatError(
            f"Packed codes of shape {list(packed.shape)}"
            f" hold {packed.shape[1] * (_WORD_BITS // num_bits)} columns, not {k}."
        )
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes: torch.Tensor = unpack_from_int32(packed, num_bits, torch.Size((packed.shape[0], k)))
    return codes


def pack_factors(factors: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Pack sidecar factors to what is stored.

    Args:
        factors: int8, any shape. ``num_bits`` 8: values in [-128, 127], returned as they are.
            ``num_bits`` 4: values in [-8, 7] and an even last axis.
        num_bits: 8 or 4.

    Returns:
        int8 of the same shape, or uint8 with the last axis halved: two factors per byte, low nibble
        first, each stored as value + 8.

    Raises:
        SvskFormatError: wrong dtype, odd last axis, a value out of range, or another number of
            bits.
    """
    if factors.dtype != torch.int8:
        raise SvskFormatError(f"Sidecar factors: expected int8, got {factors.dtype}.")
    if num_bits == 8:
        return factors
    _require_factor_bits(num_bits)
    if factors.shape[-1] % 2:
        raise SvskFormatError(
            f"4-bit sidecar factors of shape {list(factors.shape)}: the last axis must be even."
        )
    if factors.numel() and (int(factors.min()) < CODE_MIN or int(factors.max()) > CODE_MAX):
        raise SvskFormatError(
            f"4-bit sidecar factors span {int(factors.min())} to {int(factors.max())}: "
            f"expected {CODE_MIN} to {CODE_MAX}."
        )
    nibbles = (factors + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_factors(stored: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_factors`: int8 of the unpacked shape.

    Raises:
        SvskFormatError: the dtype is not the one ``num_bits`` is stored in.
    """
    if num_bits == 8:
        if stored.dtype != torch.int8:
            raise SvskFormatError(f"8-bit sidecar factors: expected int8, got {stored.dtype}.")
        return stored
    _require_factor_bits(num_bits)
    if stored.dtype != torch.uint8:
        raise SvskFormatError(f"4-bit sidecar factors: expected uint8, got {stored.dtype}.")
    pairs = torch.stack((stored & 15, stored >> 4), dim=-1)
    return pairs.flatten(-2).to(torch.int8) - 8


def _require_factor_bits(num_bits: int) -> None:
    if num_bits != 4:
        raise SvskFormatError(f"Sidecar factors of {num_bits} bits: expected 4 or 8.")
