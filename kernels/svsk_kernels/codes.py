# SPDX-License-Identifier: Apache-2.0
"""Codebooks by name, and the bits of their codes. Imports nothing heavy, as recipes are read."""

from typing import Final, Literal, get_args

__all__ = ["CODEBOOKS", "CODE_MAX", "CODE_MIN", "Codebook", "code_bits"]

Codebook = Literal["int4", "quad8", "int8"]
CODEBOOKS: Final[tuple[str, ...]] = get_args(Codebook)

CODE_MIN: Final = -8
CODE_MAX: Final = 7


def code_bits(codebook: Codebook) -> Literal[4, 8]:
    """Bits of a code: 8 of the codebook ``int8``, 4 of the others."""
    return 8 if codebook == "int8" else 4
