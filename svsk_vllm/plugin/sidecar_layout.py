# SPDX-License-Identifier: Apache-2.0
"""Which rows and columns of the checkpoint a vLLM layer holds, and how its sidecar is laid out.

vLLM's loaders divide tensors by sizes, which drops the last tile of a sidecar wherever a shard does
not end on a tile. So the layer's own loader is asked instead: it loads ``arange`` probes, and what
arrives says which checkpoint rows and columns belong where (fused layers, tensor parallelism and
replicated KV heads included). A V slot or a column of U slots that a shard boundary cuts is then
held by both ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup, append_slot
from svsk_vllm.format import ConfigGroup, SidecarArgs, SvskFormatError
from svsk_vllm.plugin.shard_probe import ShardId

__all__ = ["PartLayout", "SidecarLayout", "StoredSlot", "build_layout"]


@dataclass(frozen=True)
class StoredSlot:
    """Where the checkpoint holds what goes into a slot of the layer's plan."""

    index: int  # into the plan's slots
    row: int  # first row in the checkpoint tensor
    tile: int  # row of tiles


@dataclass(frozen=True)
class PartLayout:
    """What of one checkpoint tensor this layer holds."""

    sidecar: SidecarArgs
    tile_n: int  # resolved: never 0
    col_start: int  # first checkpoint column this layer holds
    bundle: Bundle
    slots: tuple[StoredSlot, ...]

    @property
    def tile_columns(self) -> slice:
        """Column tiles of the checkpoint that this layer's columns touch."""
        first = self.col_start // self.tile_n
        return slice(first, first + self.bundle.num_col_tiles)


@dataclass(frozen=True)
class SidecarLayout:
    """Plan of a layer, and its parts by vLLM's shard id."""

    plan: SidecarPlan
    parts: dict[ShardId, PartLayout]


@dataclass(frozen=True)
class _Member:
    """A part while its bundle is being put together. Runs are those of :func:`_runs`."""

    shard: ShardId
    sidecar: SidecarArgs
    tile_n: int
    col_start: int
    runs: list[tuple[int, int, int, int]]


def build_layout(
    prefix: str,
    shards: Sequence[tuple[ShardId, ConfigGroup]],
    rows_of: Callable[[ShardId], torch.Tensor],
    columns_of: Callable[[ShardId], torch.Tensor],
    source_columns: int,
    n: int,
) -> SidecarLayout | None:
    """Lay out the sidecars of a layer.

    Args:
        prefix: name of the layer, for errors.
        shards: shard ids and schemes, in the order of the layer's rows.
        rows_of: result of :func:`probe_rows` for a shard.
        columns_of: result of :func:`probe_columns` for a shard.
        source_columns: columns K of the checkpoint tensors.
        n: rows of the layer.

    Returns:
        None when no shard has a sidecar.

    Raises:
        SvskFormatError: the layer's columns are not a run of the checkpoint's columns.
    """
    bundles: dict[tuple[int, ...], list[_Member]] = {}
    for shard, scheme in shards:
        if not scheme.sidecar.rank:
            continue
        columns = columns_of(shard)
        start, count = int(columns[0]), len(columns)
        # No comparison with an arange: probes are on the CPU, and an arange here need not be.
        if start < 0 or bool((columns.diff() != 1).any()):
            raise SvskFormatError(
                f"{prefix}: vLLM loads columns that do not follow each other; a sidecar needs a run"
                " of them."
            )
        tile_n = scheme.sidecar.tile_n or source_columns
        runs = _runs(rows_of(shard), scheme.sidecar.tile_m or torch.iinfo(torch.int64).max)
        member = _Member(shard, scheme.sidecar, tile_n, start, runs)
        bundles.setdefault(_bounds(start, count, tile_n), []).append(member)
    if not bundles:
        return None
    built: list[Bundle] = []
    parts: dict[ShardId, PartLayout] = {}
    index = 0  # of a slot in the plan
    for bounds, members in bundles.items():
        groups: list[SlotGroup] = []
        for member in members:
            for row_start, rows, _, _ in member.runs:
                append_slot(groups, rows, member.sidecar.rank, row_start)
        bundle = Bundle(bounds, tuple(groups))
        for member in members:
            stored = tuple(
                StoredSlot(number, row, tile)
                for number, (_, _, row, tile) in enumerate(member.runs, index)
            )
            parts[member.shard] = PartLayout(
                member.sidecar, member.tile_n, member.col_start, bundle, stored
            )
            index += len(stored)
        built.append(bundle)
    return SidecarLayout(SidecarPlan(n, tuple(built)), parts)


def _bounds(start: int, count: int, tile_n: int) -> tuple[int, ...]:
    """Edges, from the layer's first column, of the tiles of ``count`` columns from ``start``."""
    inner = range((start // tile_n + 1) * tile_n, start + count, tile_n)
    return (0, *(edge - start for edge in inner), count)


def _runs(source_rows: torch.Tensor, tile_m: int) -> list[tuple[int, int, int, int]]:
    """Runs of rows that follow each other here and in the checkpoint and share a row of tiles.

    Returns:
        Tuples of first row here, number of rows, first checkpoint row, row of tiles.
    """
    rows = (source_rows >= 0).nonzero().flatten()
    stored = source_rows[rows]
    tiles = stored // tile_m
    breaks = (rows.diff() != 1) | (stored.diff() != 1) | (tiles.diff() != 0)
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(rows)]
    return [
        (int(rows[first]), last - first, int(stored[first]), int(tiles[first]))
        for first, last in pairwise(edges)
        if last > first
    ]
