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

from svsk_kernels import Bundle, SidecarPlan, SlotGroup
from svsk_vllm.format import ConfigGroup, SidecarArgs, SvskFormatError
from svsk_vllm.plugin.shard_probe import ShardId

__all__ = ["PartLayout", "SidecarLayout", "Slot", "build_layout"]


@dataclass(frozen=True)
class Slot:
    """Consecutive output rows of this layer that lie in one row of tiles of one checkpoint tensor."""

    row_start: int  # first row in this layer
    rows: int
    source_row: int  # first row in the checkpoint tensor
    tile: int  # row of tiles
    u_start: int  # offset in the flat u
    rank_start: int  # offset along R within the bundle


@dataclass(frozen=True)
class PartLayout:
    """One checkpoint tensor's place in the layer's run-time tensors."""

    sidecar: SidecarArgs
    tile_n: int  # resolved: never 0
    col_start: int  # first checkpoint column this layer holds
    bundle: Bundle
    v_start: int  # offset of the bundle in the flat v
    gain_start: int  # offset of the bundle in the flat gain
    slots: tuple[Slot, ...]

    @property
    def first_tile(self) -> int:
        """Column tile of the checkpoint that this layer's first column lies in."""
        return self.col_start // self.tile_n


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
        if start < 0 or bool(
            (columns.diff() != 1).any()
        ):  # probes are on the CPU, and an arange here need not be
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
    u_start = v_start = gain_start = 0
    for bounds, members in bundles.items():
        groups: list[SlotGroup] = []
        slots: list[list[Slot]] = []
        rank_start = 0
        for member in members:
            slots.append([])
            for row_start, rows, source_row, tile in member.runs:
                slots[-1].append(Slot(row_start, rows, source_row, tile, u_start, rank_start))
                u_start += rows * (len(bounds) - 1) * member.sidecar.rank
                rank_start += member.sidecar.rank
                _append(groups, SlotGroup(1, rows, member.sidecar.rank, row_start))
        bundle = Bundle(bounds, tuple(groups))
        for member, placed in zip(members, slots, strict=True):
            parts[member.shard] = PartLayout(
                member.sidecar,
                member.tile_n,
                member.col_start,
                bundle,
                v_start,
                gain_start,
                tuple(placed),
            )
        built.append(bundle)
        v_start += bundle.v_numel
        gain_start += bundle.gain_numel
    return SidecarLayout(SidecarPlan(n, tuple(built)), parts)


def _bounds(start: int, count: int, tile_n: int) -> tuple[int, ...]:
    """Edges, counted from the layer's first column, of the column tiles that ``count`` columns from ``start`` touch."""
    inner = range((start // tile_n + 1) * tile_n, start + count, tile_n)
    return (0, *(edge - start for edge in inner), count)


def _runs(source_rows: torch.Tensor, tile_m: int) -> list[tuple[int, int, int, int]]:
    """Runs of rows that follow each other here and in the checkpoint and share a row of tiles.

    Returns:
        Tuples of first row here, number of rows, first checkpoint row, row of tiles.
    """
    here = (source_rows >= 0).nonzero().flatten()
    there = source_rows[here]
    tiles = there // tile_m
    breaks = (here.diff() != 1) | (there.diff() != 1) | (tiles.diff() != 0)
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(here)]
    return [
        (int(here[first]), last - first, int(there[first]), int(tiles[first]))
        for first, last in pairwise(edges)
        if last > first
    ]


def _append(groups: list[SlotGroup], slot: SlotGroup) -> None:
    """Join a slot to the last group if it continues it, or start a group."""
    if groups:
        last = groups[-1]
        if (last.rows, last.rank, last.row_start + last.slots * last.rows) == (
            slot.rows,
            slot.rank,
            slot.row_start,
        ):
            groups[-1] = SlotGroup(last.slots + 1, last.rows, last.rank, last.row_start)
            return
    groups.append(slot)
