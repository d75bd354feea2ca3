# SPDX-License-Identifier: Apache-2.0
"""Where the sidecars of one (possibly fused and sharded) layer lie in its run-time tensors.

A *slot* is the part of one row of tiles that this layer holds: some consecutive output rows that
share a V. Slots of one height and rank that follow each other form a group, so that they multiply
as one batch. Slots whose columns are cut at the same places form a bundle; a fused layer has one
bundle unless its parts have different ``tile_n``.

Run-time tensors are flat, bundle after bundle, group after group:

- ``v``: per bundle [B, R, width], B column tiles, R the sum of its slots' ranks, width the widest
  column tile; columns beyond a tile's own width are zero;
- ``gain``: per bundle [B, R];
- ``u``: per group [slots, rows, B * rank].

Nobody else counts offsets: :class:`SidecarPlan` gives the parts of the flat tensors as views, to
read and to write, per bundle (``v_bundles``, ...) or per slot (``slots``, ``u_slots``, ``v_slots``,
``gain_slots``, all in one order), and :meth:`Bundle.column_tiles` cuts those of ``v`` into tiles.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

__all__ = ["Bundle", "SidecarPlan", "Slot", "SlotGroup", "append_slot"]


@dataclass(frozen=True)
class SlotGroup:
    """Consecutive slots of the same height and rank."""

    slots: int
    rows: int  # output rows per slot
    rank: int
    row_start: int  # first output row of the first slot

    @property
    def row_stop(self) -> int:
        """End of the output rows of the last slot."""
        return self.row_start + self.slots * self.rows


@dataclass(frozen=True)
class Slot:
    """Consecutive output rows that share a V."""

    bundle: int  # index into the plan's bundles
    rows: slice  # of the layer's outputs
    ranks: slice  # along R within the bundle

    @property
    def rank(self) -> int:
        """Ranks per column tile."""
        return int(self.ranks.stop - self.ranks.start)


def append_slot(groups: list[SlotGroup], rows: int, rank: int, row_start: int) -> None:
    """Add a slot of ``rows`` outputs from ``row_start``: to the last group if it goes on there."""
    if groups:
        last = groups[-1]
        if (last.rows, last.rank, last.row_stop) == (rows, rank, row_start):
            groups[-1] = replace(last, slots=last.slots + 1)
            return
    groups.append(SlotGroup(1, rows, rank, row_start))


@dataclass(frozen=True)
class Bundle:
    """Groups that share their column tiles.

    ``bounds`` are the B + 1 edges of the tiles, from 0 to K.
    """

    bounds: tuple[int, ...]
    groups: tuple[SlotGroup, ...]

    @property
    def num_col_tiles(self) -> int:
        """B."""
        return len(self.bounds) - 1

    @cached_property
    def width(self) -> int:
        """Columns of the widest tile."""
        return max(stop - start for start, stop in pairwise(self.bounds))

    @cached_property
    def uniform(self) -> bool:
        """Whether all column tiles have the same width."""
        return self.width * self.num_col_tiles == self.bounds[-1]

    @cached_property
    def total_rank(self) -> int:
        """R, the sum of the ranks of all slots."""
        return sum(group.slots * group.rank for group in self.groups)

    @property
    def slot_ranks(self) -> list[int]:
        """Rank of each slot, in order; they add up to R."""
        return [group.rank for group in self.groups for _ in range(group.slots)]

    def column_tiles(self, v: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Walk over the column tiles.

        Args:
            v: any [B, ..., width], such as this bundle's part of ``v`` or that of a slot.

        Yields:
            The columns of each tile, and its view [..., columns] without the padding.
        """
        for tile, (start, stop) in zip(v, pairwise(self.bounds), strict=True):
            yield slice(start, stop), tile[..., : stop - start]


@dataclass(frozen=True)
class SidecarPlan:
    """All bundles of a layer with ``n`` output rows."""

    n: int
    bundles: tuple[Bundle, ...]

    @cached_property
    def covers_all_rows(self) -> bool:
        """Whether every output row belongs to a slot."""
        groups = [group for bundle in self.bundles for group in bundle.groups]
        return sum(group.slots * group.rows for group in groups) == self.n

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All slots, in the order in which the flat tensors hold them."""
        slots = []
        for index, bundle in enumerate(self.bundles):
            rank_start = 0
            for group in bundle.groups:
                for row in range(group.row_start, group.row_stop, group.rows):
                    ranks = slice(rank_start, rank_start + group.rank)
                    slots.append(Slot(index, slice(row, row + group.rows), ranks))
                    rank_start += group.rank
        return tuple(slots)

    @cached_property
    def u_shapes(self) -> list[tuple[int, ...]]:
        """[slots, rows, B, rank] of each group, bundle after bundle."""
        return [
            (group.slots, group.rows, bundle.num_col_tiles, group.rank)
            for bundle in self.bundles
            for group in bundle.groups
        ]

    @cached_property
    def v_shapes(self) -> list[tuple[int, ...]]:
        """[B, R, width] of each bundle."""
        return [(b.num_col_tiles, b.total_rank, b.width) for b in self.bundles]

    @cached_property
    def gain_shapes(self) -> list[tuple[int, ...]]:
        """[B, R] of each bundle."""
        return [(b.num_col_tiles, b.total_rank) for b in self.bundles]

    def zeros(
        self, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flat ``u`` and ``v``, int8, and ``gain``, float32, to be filled.

        Args:
            device: None for PyTorch's default device, where an engine loads parameters.
        """
        u, v, gain = (
            sum(math.prod(shape) for shape in shapes)
            for shapes in (self.u_shapes, self.v_shapes, self.gain_shapes)
        )
        return (
            torch.zeros(u, dtype=torch.int8, device=device),
            torch.zeros(v, dtype=torch.int8, device=device),
            torch.zeros(gain, dtype=torch.float32, device=device),
        )

    def u_bundles(self, u: torch.Tensor) -> list[list[torch.Tensor]]:
        """Views of a flat ``u``: per bundle, per group [slots, rows, B, rank]."""
        parts = iter(_views(u, self.u_shapes))
        return [[next(parts) for _ in bundle.groups] for bundle in self.bundles]

    def v_bundles(self, v: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``v``: per bundle [B, R, width]."""
        return _views(v, self.v_shapes)

    def gain_bundles(self, gain: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``gain``: per bundle [B, R]."""
        return _views(gain, self.gain_shapes)

    def u_slots(self, u: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``u``: per slot [rows, B, rank]."""
        return [slot for groups in self.u_bundles(u) for group in groups for slot in group]

    def v_slots(self, v: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``v``: per slot [B, rank, width], padded as its bundle is."""
        return self._by_slot(self.v_bundles(v))

    def gain_slots(self, gain: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``gain``: per slot [B, rank]."""
        return self._by_slot(self.gain_bundles(gain))

    def _by_slot(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Views [B, rank, ...] of each slot, from those [B, R, ...] of each bundle."""
        pairs = zip(self.bundles, parts, strict=True)
        return [slot for bundle, part in pairs for slot in part.split(bundle.slot_ranks, dim=1)]

    def encode(self) -> list[int]:
        """The plan as integers, to pass through a custom op."""
        code = [self.n, len(self.bundles)]
        for bundle in self.bundles:
            code += [len(bundle.bounds), *bundle.bounds, len(bundle.groups)]
            for group in bundle.groups:
                code += [group.slots, group.rows, group.rank, group.row_start]
        return code

    @staticmethod
    def decode(code: Sequence[int]) -> "SidecarPlan":
        """Inverse of :meth:`encode`; plans are cached."""
        return _decode(tuple(code))


@lru_cache(maxsize=4096)
def _decode(code: tuple[int, ...]) -> SidecarPlan:
    numbers: Iterator[int] = iter(code)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(numbers) for _ in range(count))

    n, num_bundles = take(2)
    bundles = []
    for _ in range(num_bundles):
        bounds = take(next(numbers))
        groups = tuple(SlotGroup(*take(4)) for _ in range(next(numbers)))
        bundles.append(Bundle(bounds, groups))
    return SidecarPlan(n, tuple(bundles))


def _views(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Consecutive parts of a flat tensor, viewed in the given shapes, which cover it."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
