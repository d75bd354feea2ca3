# SPDX-License-Identifier: Apache-2.0
"""Scales of groups in two levels: a small integer per group, times one number per row.

``scale[n, g] = code[n, g] * row_scale[n]``, exact in the model's dtype. Codes have 8 or 6 bits and
a sign of their own. A row scale has so few significant bits (:func:`row_significand_bits`) that
every product has at most the 8 of bfloat16: what is stored can be multiplied out by whoever reads
it, in whatever order, without a rounding.
"""

from dataclasses import dataclass
from typing import Final

import torch

from svsk_vllm.format.config import ONE_LEVEL, ScaleBits
from svsk_vllm.format.errors import SvskFormatError

__all__ = [
    "ONE_LEVEL",
    "GroupScales",
    "ScaleBits",
    "join_scales",
    "pack_scale_codes",
    "row_scale_problem",
    "row_significand_bits",
    "split_scales",
    "stored_scale_columns",
    "unpack_scale_codes",
]

_BFLOAT16_BITS: Final = 8  # of a significand, the leading one counted
_CODES_PER_BLOCK: Final = 4  # 6-bit codes that fill whole bytes
_BLOCK_BYTES: Final = 3
_OCTAVES: Final = 8
"""How many times too large a row scale may be and still be found: as often as a code has bits."""
_SMALLEST_EXPONENT: Final = {torch.float16: -24, torch.bfloat16: -126, torch.float32: -126}
"""Of a row scale. Float16 has subnormals to 2^-24, and all multiples of that are exact in it."""


def row_significand_bits(scale_bits: int) -> int:
    """Significant bits of a row scale: 1 (a power of two) with 8-bit codes, 3 with 6-bit ones."""
    return _BFLOAT16_BITS + 1 - scale_bits


@dataclass(frozen=True)
class GroupScales:
    """How a linear stores the scales of its groups.

    Attributes:
        dtype: the model's: of the scales themselves, or of what is stored per row.
        bits: of a group's code; 16 for scales stored as they are.
    """

    dtype: torch.dtype
    bits: ScaleBits = 16

    def row_scale(self, scale: torch.Tensor) -> torch.Tensor | None:
        """The least row scale under which no scale of its row exceeds the largest code.

        Args:
            scale: floating [N, G].

        Returns:
            float32 [N, 1]; None where scales are stored as they are.
        """
        if self.bits == ONE_LEVEL:
            return None
        largest = scale.abs().amax(1, keepdim=True).float()
        return _allowed(largest / _largest_code(self.bits), self.bits, self.dtype)

    def round(self, scale: torch.Tensor, row_scale: torch.Tensor | None) -> torch.Tensor:
        """The nearest scales that can be stored.

        Args:
            scale: float32 [N, G].
            row_scale: result of :meth:`row_scale` for these rows.

        Returns:
            float32 [N, G], values of ``dtype``.
        """
        if row_scale is None:
            return scale.to(self.dtype).float()
        top = _largest_code(self.bits)
        return (scale / row_scale).round_().clamp_(-top, top) * row_scale


def _largest_code(bits: int) -> int:
    """The most negative code has no counterpart; writers leave it out."""
    return (1 << bits - 1) - 1


def _allowed(lower: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The least allowed row scale that is no smaller than each value; 1 for a row of zeros."""
    steps = 2 ** (row_significand_bits(bits) - 1)  # per octave
    mantissa, exponent = torch.frexp(lower)  # lower = mantissa * 2^exponent, mantissa in [1/2, 1)
    mantissa = (mantissa * 2 * steps).ceil_() / (2 * steps)
    # Times the steps, so that all significant bits of a small row scale lie above the smallest.
    least = steps * 2.0 ** _SMALLEST_EXPONENT[dtype]
    row = torch.ldexp(mantissa, exponent).clamp_min(least)
    return torch.where(lower == 0, torch.ones_like(row), row)


def split_scales(scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and row scales of scales that :meth:`GroupScales.round` gave.

    Args:
        scale: [N, G], of the model's dtype.
        bits: of a code, 6 or 8.

    Returns:
        int8 [N, G], and row scales [N, 1] of the dtype of ``scale``.

    Raises:
        SvskFormatError: a row's scales are no small multiples of one allowed row scale.
    """
    wide = scale.double()
    low, top = -(1 << bits - 1), _largest_code(bits)
    # A row's largest scale fits its code under this row scale or a larger one: each is tried.
    row = _allowed(wide.abs().amax(1, keepdim=True).float() / -low, bits, scale.dtype).double()
    steps = 2 ** (row_significand_bits(bits) - 1)
    codes = torch.zeros_like(wide)
    rows = torch.ones_like(row)
    left = torch.ones(len(scale), dtype=torch.bool, device=scale.device)
    for _ in range(_OCTAVES * steps + 1):
        ratio = wide / row
        fits = ((ratio == ratio.round()) & (ratio >= low) & (ratio <= top)).all(1) & left
        codes[fits], rows[fits] = ratio[fits], row[fits]
        left &= ~fits
        if not bool(left.any()):
            return codes.to(torch.int8), rows.to(scale.dtype)
        mantissa, exponent = torch.frexp(row)
        row = torch.ldexp(mantissa + 1 / (2 * steps), exponent)  # the next larger allowed one
    raise SvskFormatError(
        f"scales of {int(left.sum())} of {len(scale)} rows are no {bits}-bit multiples of a row"
        " scale: round them before they are stored."
    )


def join_scales(codes: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] of the row scales' dtype from int8 codes [N, G] and row scales [N, 1]."""
    return (codes.float() * row_scale.float()).to(row_scale.dtype)


def row_scale_problem(row_scale: torch.Tensor, bits: int) -> str | None:
    """What is wrong with row scales: not positive and finite, or of too many significant bits.

    Args:
        row_scale: [N, 1].
        bits: of a code, 6 or 8.
    """
    wide = row_scale.double()
    if bad := int((~(wide.isfinite() & (wide > 0))).sum()):
        return f"{bad} of {row_scale.numel()} values are not positive and finite"
    significand = torch.frexp(wide).mantissa * 2 ** row_significand_bits(bits)
    if bad := int((significand != significand.round()).sum()):
        return (
            f"{bad} of {row_scale.numel()} values have more than"
            f" {row_significand_bits(bits)} significant bit(s)"
        )
    return None


def stored_scale_columns(groups: int, bits: int) -> int:
    """Bytes a row of ``groups`` codes takes: 6-bit codes fill up their last three bytes."""
    if bits == 8:
        return groups
    return -(-groups // _CODES_PER_BLOCK) * _BLOCK_BYTES


def pack_scale_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What is stored of a group's codes.

    Args:
        codes: int8 [N, G], in the range of ``bits``.
        bits: 8: the codes as they are; 6: four to three bytes.

    Returns:
        int8 [N, G], or uint8 [N, 3 * ceil(G / 4)]: of four codes, each stored as ``code + 32``, the
        first in the lowest six bits of the three bytes, which are in little-endian order.

    Raises:
        SvskFormatError: a code out of range.
    """
    if bits == 8:
        return codes
    limit = 1 << bits - 1
    if codes.numel() and (int(codes.min()) < -limit or int(codes.max()) >= limit):
        raise SvskFormatError(
            f"{bits}-bit scale codes span {int(codes.min())} to {int(codes.max())}: expected"
            f" {-limit} to {limit - 1}."
        )
    n, groups = codes.shape
    fields = torch.nn.functional.pad(codes.int() + limit, (0, -groups % _CODES_PER_BLOCK))
    fields = fields.view(n, -1, _CODES_PER_BLOCK)
    word = sum(fields[:, :, i] << bits * i for i in range(_CODES_PER_BLOCK))
    assert isinstance(word, torch.Tensor)
    parts = [(word >> 8 * i) & 255 for i in range(_BLOCK_BYTES)]
    return torch.stack(parts, dim=2).view(n, -1).to(torch.uint8)


def unpack_scale_codes(stored: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """Inverse of :func:`pack_scale_codes`: int8 [N, ``groups``].

    Raises:
        SvskFormatError: another dtype or shape than ``groups`` codes of ``bits`` are stored in.
    """
    expected = (torch.int8 if bits == 8 else torch.uint8, stored_scale_columns(groups, bits))
    if stored.ndim != 2 or (stored.dtype, stored.shape[1]) != expected:
        raise SvskFormatError(
            f"{bits}-bit scale codes: {stored.dtype} {list(stored.shape)}, expected {expected[0]}"
            f" with {expected[1]} columns for {groups} groups."
        )
    if bits == 8:
        return stored
    parts = stored.view(len(stored), -1, _BLOCK_BYTES).int()
    word = parts[:, :, 0] | parts[:, :, 1] << 8 | parts[:, :, 2] << 16
    fields = [(word >> bits * i) & (1 << bits) - 1 for i in range(_CODES_PER_BLOCK)]
    codes = torch.stack(fields, dim=2).view(len(stored), -1)[:, :groups]
    return (codes - (1 << bits - 1)).to(torch.int8).contiguous()
