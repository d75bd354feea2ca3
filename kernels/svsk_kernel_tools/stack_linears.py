# SPDX-License-Identifier: Apache-2.0
"""Quantised linears that share an input, stacked into one layer as an inference engine fuses them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch

from svsk_kernels.naive import PlainLinear
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup

__all__ = ["StackedLinear", "pack_words", "stack_linears"]


@dataclass(frozen=True)
class StackedLinear:
    """A layer as loaders leave it, before a kernel repacks it.

    Factors and gains flat, in the plan's order.
    """

    packed: torch.Tensor  # int32 [N, K / 8]
    scale: torch.Tensor  # [N, K / g]
    plan: SidecarPlan | None
    u: torch.Tensor  # int8
    v: torch.Tensor  # int8
    gain: torch.Tensor  # float32
    num_bits: Literal[4, 8]  # 4 when all factors have 4 bits


@dataclass
class _Members:
    """Slots with the same column tiles, and their factors."""

    groups: list[SlotGroup] = field(default_factory=list)
    u: list[torch.Tensor] = field(default_factory=list)  # flat [rows, B * r]
    v: list[torch.Tensor] = field(default_factory=list)  # [B, r, width]
    gain: list[torch.Tensor] = field(default_factory=list)  # [B, r]


def stack_linears(linears: Sequence[PlainLinear]) -> StackedLinear:
    """Stack linears along their rows.

    Args:
        linears: of one K, group size and codebook; ranks, tiles and factor bits may differ.

    Raises:
        ValueError: their K, group sizes or codebooks differ.
    """
    first = linears[0]
    for number, linear in enumerate(linears):
        if (linear.grid.k, linear.group_size, linear.codebook) != (
            first.grid.k,
            first.group_size,
            first.codebook,
        ):
            raise ValueError(f"Linears {number} and 0 differ in columns, group size or codebook.")
    bundles: dict[tuple[int, ...], _Members] = {}
    row = 0
    for linear in linears:
        grid = linear.grid
        if linear.rank:
            bounds = (*range(0, grid.k, grid.tile_cols), grid.k)
            _add_slots(bundles.setdefault(bounds, _Members()), linear, bounds, row)
        row += grid.n
    packed = torch.cat([pack_words(linear.codes) for linear in linears])
    scale = torch.cat([linear.scale for linear in linears])
    if not bundles:
        empty = torch.empty(0, dtype=torch.int8)
        return StackedLinear(packed, scale, None, empty, empty, torch.empty(0), 8)
    members = bundles.values()
    return StackedLinear(
        packed,
        scale,
        SidecarPlan(
            row, tuple(Bundle(bounds, tuple(found.groups)) for bounds, found in bundles.items())
        ),
        torch.cat([piece for found in members for piece in found.u]),
        torch.cat([torch.cat(found.v, dim=1).flatten() for found in members]),
        torch.cat([torch.cat(found.gain, dim=1).flatten() for found in members]),
        4 if {linear.factor_bits for linear in linears if linear.rank} == {4} else 8,
    )


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 [N, K] as int32 [N, K / 8], as ``svsk_vllm.format.pack_codes`` does, which needs another library."""
    packed = torch.zeros(
        codes.shape[0], codes.shape[1] // 8, dtype=torch.int32, device=codes.device
    )
    for place in range(8):
        packed |= (codes[:, place::8].to(torch.int32) + 8) << (4 * place)
    return packed


def _add_slots(members: _Members, linear: PlainLinear, bounds: tuple[int, ...], row: int) -> None:
    """Add the rows of tiles of one linear, which begins at output row ``row``."""
    assert linear.u is not None
    assert linear.v is not None
    assert linear.gain is not None
    rank, grid = linear.rank, linear.grid
    for a in range(grid.num_row_tiles):
        rows = grid.row_slice(a)
        tiles = linear.v.new_zeros(
            len(bounds) - 1, rank, max(stop - start for start, stop in pairwise(bounds))
        )
        for b, (start, stop) in enumerate(pairwise(bounds)):
            tiles[b, :, : stop - start] = linear.v[a, :, start:stop]
        members.groups.append(SlotGroup(1, rows.stop - rows.start, rank, row + rows.start))
        members.u.append(linear.u[rows].flatten())
        members.v.append(tiles)
        members.gain.append(linear.gain[a])
