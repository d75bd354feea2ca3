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
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

__all__ = ["Bundle", "SidecarPlan", "SlotGroup"]


@dataclass(frozen=True)
class SlotGroup:
    """Consecutive slots of the same height and rank."""

    slots: int
    rows: int  # output rows per slot
    rank: int
    row_start: int  # first output row of the first slot


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
    def v_shape(self) -> tuple[int, int, int]:
        """Shape of this bundle's part of ``v``."""
        return self.num_col_tiles, self.total_rank, self.width

    @property
    def v_numel(self) -> int:
        """Elements of this bundle's part of ``v``."""
        return self.num_col_tiles * self.total_rank * self.width

    @property
    def gain_shape(self) -> tuple[int, int]:
        """Shape of this bundle's part of ``gain``."""
        return self.num_col_tiles, self.total_rank

    @property
    def gain_numel(self) -> int:
        """Elements of this bundle's part of ``gain``."""
        return self.num_col_tiles * self.total_rank


@dataclass(frozen=True)
class SidecarPlan:
    """All bundles of a layer with ``n`` output rows."""

    n: int
    bundles: tuple[Bundle, ...]

    @cached_property
    def covers_all_rows(self) -> bool:
        """Whether every output row belongs to a slot."""
        return (
            sum(group.slots * group.rows for bundle in self.bundles for group in bundle.groups)
            == self.n
        )

    @cached_property
    def u_numel(self) -> int:
        """Elements of ``u``."""
        return sum(
            group.slots * group.rows * bundle.num_col_tiles * group.rank
            for bundle in self.bundles
            for group in bundle.groups
        )

    @cached_property
    def v_numel(self) -> int:
        """Elements of ``v``."""
        return sum(bundle.v_numel for bundle in self.bundles)

    @cached_property
    def gain_numel(self) -> int:
        """Elements of ``gain``."""
        return sum(bundle.gain_numel for bundle in self.bundles)

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
