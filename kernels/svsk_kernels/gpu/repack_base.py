# SPDX-License-Identifier: Apache-2.0
"""The base's codes and scales in the order in which the GPU kernels read them.

Codes lie in *planes*: a 16-bit word holds four codes that are ``plane`` columns apart. Block t
covers ``4 * plane`` columns; nibble j of its word p is the code (as ``q + 8``) of column ``(4 * t +
j) * plane + p``. So a tile of words looks like a tile of a 16-bit matrix to the copy units, and one
shift and mask turn it into four tiles of codes for four matrix products. Rows are padded to a
multiple of :data:`ROW_PAD` with codes of zero, columns to whole blocks. Scales are stored group by
group, so that a block of rows reads consecutive ones.

Scales of two levels keep their 8-bit codes, as *scale words*: the codes (as ``code + 128``) that
the four codes of a word of the base take, one byte each. So a kernel reads one scale word per row
for all the words of a run, and copies of 32-bit words run ahead of the products, as those of 16-bit
scales do not. Where a group is longer than a plane, the planes that share it share a byte, and
scale words have two bytes or one: no code is stored twice.
"""

from typing import Any, Final, NamedTuple

import torch

from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "ROW_PAD",
    "Base",
    "pack_base",
    "pack_row_scale",
    "pack_scale",
    "pack_scale_codes",
    "plane_length",
    "unpack_rows",
    "unpack_scale_rows",
]

ROW_PAD: Final = 256
"""Rows of the stored base are padded to this: a multiple of every block of rows."""

_SCALE_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32}

_UNPACK_ELEMENTS: Final = 1 << 25
"""Codes unpacked at a time: bounds the memory of repacking."""


class Base(NamedTuple):
    """Base of a layer as the kernels read it."""

    words: torch.Tensor  # int16 [padded N, padded K / 4]
    scale: torch.Tensor  # [groups, padded N], or scale words [runs, padded N] with row_scale
    n: int
    k: int
    plane: int
    group_size: int
    quad8: bool
    row_scale: torch.Tensor | None = None  # [padded N]; None: scales of one level

    @property
    def n_padded(self) -> int:
        """Rows with padding."""
        return self.words.shape[0]

    @property
    def k_padded(self) -> int:
        """Columns with padding."""
        return self.words.shape[1] * 4

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of the layout."""
        return {
            "PLANE": self.plane,
            "GROUP": self.group_size,
            "EVEN_K": self.k == self.k_padded,
            "QUAD8": self.quad8,
        }


def plane_length(k: int) -> int:
    """Columns between the codes of a word, 64, 32 or 16.

    The longest that pads ``k`` by at most 2%, or by least.
    """
    waste = {plane: ceil_div(k, 4 * plane) * 4 * plane - k for plane in (64, 32, 16)}
    return next(
        (plane for plane, pad in waste.items() if pad <= 0.02 * k),
        min(waste, key=lambda plane: waste[plane]),
    )


def pack_base(packed: torch.Tensor, k: int, plane: int) -> torch.Tensor:
    """Repack the codes of a checkpoint.

    Args:
        packed: int32 [N, K / 8], see docs/format.md.
        k: columns K, a multiple of 8.
        plane: see :func:`plane_length`.

    Returns:
        int16 [N padded to ROW_PAD, K padded to 4 * plane, / 4].
    """
    n, block = packed.shape[0], 4 * plane
    width = ceil_div(k, block) * block
    words = torch.full(
        (ceil_div(n, ROW_PAD) * ROW_PAD, width // 4), 0x8888 - 0x10000, dtype=torch.int16
    )
    words = words.to(packed.device)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    rows = max(1, _UNPACK_ELEMENTS // width)
    for start in range(0, n, rows):
        part = packed[start : start + rows]
        codes = torch.full((part.shape[0], width), 8, dtype=torch.int32, device=packed.device)
        codes[:, :k] = ((part.unsqueeze(-1) >> shifts) & 15).flatten(1)
        planes = codes.view(part.shape[0], -1, 4, plane)
        word = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
        words[start : start + part.shape[0]] = (
            torch.where(word >= 0x8000, word - 0x10000, word).flatten(1).to(torch.int16)
        )
    return words


def pack_scale(scale: torch.Tensor, plane: int, group_size: int) -> torch.Tensor:
    """Scales [N, K / g] as [groups of the padded columns, padded rows], zero in padding."""
    n, groups = scale.shape
    block = 4 * plane
    padded = ceil_div(groups * group_size, block) * block // group_size
    stored = scale.new_zeros(padded, ceil_div(n, ROW_PAD) * ROW_PAD)
    stored[:groups, :n] = scale.T
    return stored


def pack_scale_codes(codes: torch.Tensor, plane: int, group_size: int) -> torch.Tensor:
    """Scale words of the codes of a layer whose scales have two levels.

    Word ``w`` of the base, counted along a padded row, takes scale word ``w // min(plane, g)``; its
    nibble j the byte ``j``, or ``j * b // 4`` where scale words have b bytes.

    Args:
        codes: int8 [N, K / g].
        plane: see :func:`plane_length`.
        group_size: g.

    Returns:
        int32, int16 or int8 [padded K / 4 / min(plane, g), padded rows]; codes of zero in padding.
    """
    n, groups = codes.shape
    block = 4 * plane
    num_blocks, runs = ceil_div(groups * group_size, block), max(1, plane // group_size)
    num_bytes = block // group_size // runs
    padded_rows = ceil_div(n, ROW_PAD) * ROW_PAD
    stored = codes.new_zeros(num_blocks * num_bytes * runs, padded_rows)
    stored[:groups, :n] = codes.T
    biased = (stored.to(torch.int16) + 128).to(torch.uint8)
    # a plane's groups follow each other, and planes do: byte, run
    words = biased.view(num_blocks, num_bytes, runs, padded_rows).permute(0, 2, 3, 1).contiguous()
    return words.view(_SCALE_WORDS[num_bytes]).view(num_blocks * runs, padded_rows)


def pack_row_scale(row_scale: torch.Tensor) -> torch.Tensor:
    """Scales of rows, [N, 1] as [padded rows], zero in padding."""
    n = row_scale.shape[0]
    stored = row_scale.new_zeros(ceil_div(n, ROW_PAD) * ROW_PAD)
    stored[:n] = row_scale[:, 0]
    return stored


def unpack_rows(words: torch.Tensor, ids: torch.Tensor, k: int, plane: int) -> torch.Tensor:
    """Codes of some rows of what :func:`pack_base` gives.

    Args:
        words: int16 [padded N, padded K / 4].
        ids: int64 [M].
        k: columns K.
        plane: as it was packed with.

    Returns:
        int32 [M, K].
    """
    blocks = words[ids].to(torch.int32).unflatten(1, (-1, 1, plane))
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device).view(4, 1)
    codes: torch.Tensor = ((blocks >> shifts) & 15) - 8
    return codes.flatten(1)[:, :k]


def unpack_scale_rows(
    words: torch.Tensor, ids: torch.Tensor, groups: int, plane: int, group_size: int
) -> torch.Tensor:
    """Codes of scales of some rows of what :func:`pack_scale_codes` gives, int8 [M, groups].

    Args:
        words: int32, int16 or int8 [words of a row, padded N].
        ids: int64 [M].
        groups: of a row without its padding.
        plane: as they were packed with.
        group_size: likewise.
    """
    some = words[:, ids].unsqueeze(-1).contiguous().view(torch.uint8)  # [words, M, bytes]
    codes: torch.Tensor = some.unflatten(0, (-1, max(1, plane // group_size))).permute(2, 0, 3, 1)
    return (codes.flatten(1)[:, :groups].to(torch.int16) - 128).to(torch.int8)
