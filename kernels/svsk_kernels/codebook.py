# SPDX-License-Identifier: Apache-2.0
"""The levels that codes stand for, in units of the group's scale: 16 of 4 bits, 256 of 8."""

import torch

from svsk_kernels.codes import CODE_MAX, CODE_MIN, CODEBOOKS, Codebook, code_bits

__all__ = [
    "CODEBOOKS",
    "CODE_MAX",
    "CODE_MIN",
    "Codebook",
    "code_bits",
    "code_values",
    "codebook_levels",
    "unpack_bytes",
    "unpack_codes_of",
    "unpack_nibbles",
]


def code_values(
    codes: torch.Tensor, codebook: Codebook, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Value of each code in units of its scale: ``c(q)`` in docs/format.md.

    Args:
        codes: integer or floating tensor of codes in [-8, 7], any shape; in [-128, 127] for
            ``int8``.
        codebook: ``int4`` and ``int8`` (``c = q``) or ``quad8`` (``c = q (8 + |q|) / 8``, from -16
            to 13.125).
        dtype: dtype of the result. Every value is exact in float16, bfloat16 and float32.

    Returns:
        Tensor of the shape of ``codes`` and of dtype ``dtype``.
    """
    values = codes.to(torch.float32)
    if codebook == "quad8":
        values = values * (8 + values.abs()) / 8
    return values.to(dtype)


def codebook_levels(codebook: Codebook) -> torch.Tensor:
    """All levels in ascending order, float32 [L].

    Entry ``i`` of L = 16 belongs to code ``i - 8``, of 256 (``int8``) to ``i - 128``.
    """
    half = 1 << code_bits(codebook) - 1
    return code_values(torch.arange(-half, half), codebook)


def unpack_codes_of(packed: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Codes [N, K] of a codebook from the checkpoint's words, unchecked."""
    return unpack_bytes(packed) if code_bits(codebook) == 8 else unpack_nibbles(packed)


def unpack_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Codes in [-128, 127] from the checkpoint's words (docs/format.md), unchecked.

    Args:
        packed: int32 [N, K / 4], four codes a word, lowest byte first, each stored as ``q + 128``.

    Returns:
        int8 [N, K].
    """
    # 128 more, in a byte, is another highest bit.
    return packed.contiguous().view(torch.int8) ^ -128


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Codes in [-8, 7] from the checkpoint's words (docs/format.md), unchecked.

    Args:
        packed: int32 [N, K / 8], eight codes a word, lowest nibble first, each stored as ``q + 8``.

    Returns:
        int32 [N, K].
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    # Shifts of a negative word carry its sign in from above; & 15 cuts that off.
    return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1) - 8
