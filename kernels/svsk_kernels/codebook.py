# SPDX-License-Identifier: Apache-2.0
"""The 16 levels a 4-bit code stands for, in units of the group's scale."""

from typing import Final, Literal, get_args

import torch

__all__ = [
    "CODEBOOKS",
    "CODE_MAX",
    "CODE_MIN",
    "Codebook",
    "code_values",
    "codebook_levels",
    "unpack_nibbles",
]

Codebook = Literal["int4", "quad8"]
CODEBOOKS: Final[tuple[str, ...]] = get_args(Codebook)

CODE_MIN: Final = -8
CODE_MAX: Final = 7


def code_values(
    codes: torch.Tensor, codebook: Codebook, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Value of each code in units of its scale: ``c(q)`` in docs/format.md.

    Args:
        codes: integer or floating tensor of codes in [-8, 7], any shape.
        codebook: ``int4`` (``c = q``) or ``quad8`` (``c = q (8 + |q|) / 8``, from -16 to 13.125).
        dtype: dtype of the result. Every value is exact in float16, bfloat16 and float32.

    Returns:
        Tensor of the shape of ``codes`` and of dtype ``dtype``.
    """
    values = codes.to(torch.float32)
    if codebook == "quad8":
        values = values * (8 + values.abs()) / 8
    return values.to(dtype)


def codebook_levels(codebook: Codebook) -> torch.Tensor:
    """The 16 levels in ascending order, float32 [16]; entry ``i`` belongs to code ``i - 8``."""
    return code_values(torch.arange(CODE_MIN, CODE_MAX + 1), codebook)


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
