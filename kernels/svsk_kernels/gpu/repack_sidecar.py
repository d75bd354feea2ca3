# SPDX-License-Identifier: Apache-2.0
"""The sidecar's tensors in the order in which the GPU kernels read them.

A row of U and the activations z it multiplies are found through small tables of integers, so that
parts of a fused layer may differ in rank, tiles and tile edges without another kernel:

- The rows that share a V (a *slot*, see :mod:`svsk_kernels.sidecar_plan`) own consecutive *z
  columns*, column tile by column tile, padded to :func:`z_alignment`. ``row_table`` says for every
  output row where its U begins and which z columns it takes.
- ``jobs`` cuts the product ``z = gain * (V x)`` into programs of 16 rows of V by at most
  :data:`MAX_JOB_COLUMNS`.
- ``slot_table`` and ``block_slots`` say the same to the kernel that folds the sidecar into the
  weight.

4-bit factors stay packed: two per byte, 16 z columns (U) or 64 columns (V) apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F

from svsk_kernels.errors import KernelError
from svsk_kernels.gpu.repack_base import ROW_PAD
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, Slot
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "FOLD_BYTES",
    "FOLD_ROWS",
    "MAX_JOB_COLUMNS",
    "MAX_U_BYTES",
    "V_ROWS",
    "PlanarSidecar",
    "Tiles",
    "pack_sidecar",
    "rows_at_a_time",
    "u_bytes",
    "v_pitch",
    "z_alignment",
]


V_ROWS: Final = 16
"""Rows of V that one program multiplies: the height of a tensor core's tile."""

MAX_JOB_COLUMNS: Final = 2048
"""Longest run of columns one program of the z kernel takes.

Longer tiles are split and summed in order.
"""

MAX_U_BYTES: Final = 2**31 - 1
"""Size of a layer's U: the kernels address it with 32 bits."""

_V_HALF: Final = 64
"""Distance in columns of the two 4-bit V factors in a byte."""

_U_HALF: Final = 16
"""Distance in z columns of the two 4-bit U factors in a byte."""

_V_TAIL: Final = 1024
"""Bytes after V that a program may read, and multiplies by zero."""

_NO_COLUMN: Final = 1 << 30
"""First z column of rows without a sidecar: above all others, and aligned like them."""


def z_alignment(num_bits: int) -> int:
    """Multiple to which a slot's z columns are padded: 16 bytes of U factors."""
    return 32 if num_bits == 4 else 16


class PlanarSidecar(NamedTuple):
    """Run-time tensors of the sidecars of a layer.

    S: slots, J: jobs, C: z columns, N': padded rows.
    """

    u: torch.Tensor  # uint8, flat: rows of every slot, packed or not
    v: torch.Tensor  # uint8, flat: [rows of V, pitch] and a tail that is read but not used
    gain: torch.Tensor  # float32 [C], 0 in padding
    z_used: torch.Tensor  # uint8 [C], 0 in padding
    row_table: torch.Tensor  # int32 [3, N']: first byte of U, first z column, end of the z columns
    v_table: (
        torch.Tensor
    )  # int32 [2, rows of V]: z column in tile 0 (-1: padding), z columns per tile
    jobs: (
        torch.Tensor
    )  # int32 [J, 6]: V row, first column, end, tile, first job of the same sums, number of them
    slot_table: (
        torch.Tensor
    )  # int32 [S, 8]: first row, end, V row, rank, z column, first inner edge, tile width, tiles
    block_slots: torch.Tensor  # int32 [N' / 64, 2]: first slot and end of each block of 64 rows

    @classmethod
    def names(cls) -> list[str]:
        """Names of the tensors, in the order of the constructor."""
        return list(cls._fields)

    def to(self, device: torch.device) -> "PlanarSidecar":
        """A copy on a device."""
        return PlanarSidecar(*(tensor.to(device) for tensor in self))


FOLD_ROWS: Final = 64
"""Rows per entry of ``block_slots``."""

FOLD_BYTES: Final = 128 << 20
"""Weight that is written out at a time, where all of it is."""


def rows_at_a_time(k: int, itemsize: int) -> int:
    """Rows of ``k`` columns that are written out at a time: whole FOLD_ROWS."""
    return max(FOLD_ROWS, FOLD_BYTES // (k * itemsize) // FOLD_ROWS * FOLD_ROWS)


@dataclass(frozen=True)
class Tiles:
    """What the kernels are compiled for of a layer's column tiles."""

    long: bool  # some are longer than MAX_JOB_COLUMNS, and summed from several programs
    aligned: bool  # all begin at multiples of 16 columns

    @classmethod
    def of(cls, plan: SidecarPlan | None) -> "Tiles":
        """Of a layer; ``plan`` None for no sidecar."""
        bundles = plan.bundles if plan is not None else ()
        return cls(
            any(bundle.width > MAX_JOB_COLUMNS for bundle in bundles),
            all(edge % 16 == 0 for bundle in bundles for edge in bundle.bounds),
        )


@dataclass(frozen=True)
class _PlacedSlot:
    """A slot with its place in the run-time tensors."""

    index: int  # in the plan's order
    slot: Slot
    tiles: int
    v_row: int  # first of its rows of V
    z_start: int
    z_stop: int  # end of its z columns with their padding

    @property
    def z(self) -> slice:
        """Its z columns without padding: column tile by column tile, rank by rank."""
        return slice(self.z_start, self.z_start + self.tiles * self.slot.rank)


def _place(plan: SidecarPlan, num_bits: int) -> list[_PlacedSlot]:
    """All slots in the order of their rows."""
    placed: list[_PlacedSlot] = []
    align, v_starts, z = z_alignment(num_bits), _v_rows(plan), 0
    for index, slot in sorted(enumerate(plan.slots), key=lambda entry: entry[1].rows.start):
        tiles = plan.bundles[slot.bundle].num_col_tiles
        z_stop = z + ceil_div(tiles * slot.rank, align) * align
        v_row = v_starts[slot.bundle] + slot.ranks.start
        placed.append(_PlacedSlot(index, slot, tiles, v_row, z, z_stop))
        z = z_stop
    return placed


def u_bytes(plan: SidecarPlan, num_bits: int) -> int:
    """Bytes of all rows of U, padding included; at most :data:`MAX_U_BYTES`."""
    rows = ((p.slot.rows.stop - p.slot.rows.start, p) for p in _place(plan, num_bits))
    return sum(height * (p.z_stop - p.z_start) * num_bits // 8 for height, p in rows)


def _v_rows(plan: SidecarPlan) -> list[int]:
    """First row of V of each bundle, and the number of all.

    Bundles start on a multiple of V_ROWS.
    """
    starts = [0]
    for bundle in plan.bundles:
        starts.append(starts[-1] + ceil_div(bundle.total_rank, V_ROWS) * V_ROWS)
    return starts


def v_pitch(k: int, num_bits: int) -> int:
    """Bytes of a row of V."""
    return ceil_div(k, 2 * _V_HALF) * _V_HALF if num_bits == 4 else ceil_div(k, 16) * 16


def _edges(bundle: Bundle) -> tuple[int, int]:
    """First inner edge of the column tiles, and the width of those after it.

    Raises:
        ValueError: the inner tiles have different widths.
    """
    bounds = bundle.bounds
    if len(bounds) == 2:
        return bounds[1], bounds[1]
    widths = {stop - start for start, stop in pairwise(bounds[1:-1])} or {bounds[2] - bounds[1]}
    if len(widths) > 1 or bounds[2] - bounds[1] < bounds[-1] - bounds[-2]:
        raise KernelError(f"Column tiles with edges {bounds}: expected inner tiles of one width.")
    return bounds[1], widths.pop()


def _halves(values: torch.Tensor, half: int) -> torch.Tensor:
    """4-bit integers, int8 [..., 2 * half * c], as bytes: first halves in the low nibbles."""
    pairs = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2, half))
    packed: torch.Tensor = pairs[..., 0, :] | pairs[..., 1, :] << 4
    return packed.flatten(-2)


def _store(values: torch.Tensor, num_bits: int, half: int) -> torch.Tensor:
    return _halves(values, half) if num_bits == 4 else values.view(torch.uint8)


def pack_sidecar(
    plan: SidecarPlan, k: int, u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, num_bits: int
) -> PlanarSidecar:
    """Run-time tensors of a layer's sidecars.

    Args:
        plan: where the sidecars lie.
        k: columns of the layer.
        u: int8, flat, in the plan's order.
        v: int8, flat, in the plan's order.
        gain: float32, flat, in the plan's order.
        num_bits: 4 when all factors are in [-8, 7] and shall stay packed, else 8.

    Returns:
        Tensors on the device of ``u``.

    Raises:
        ValueError: column tiles are not of one width, or a factor does not fit ``num_bits``.
    """
    if num_bits == 4:
        _require_4_bits(u=u, v=v)
    placed, starts, device = _place(plan, num_bits), _v_rows(plan), u.device
    n_padded, z_columns = ceil_div(plan.n, ROW_PAD) * ROW_PAD, placed[-1].z_stop
    row_table = torch.tensor([[0], [_NO_COLUMN], [0]], dtype=torch.int32).repeat(1, n_padded)
    v_table = torch.tensor([[-1], [0]], dtype=torch.int32).repeat(1, starts[-1])
    slot_table = torch.zeros(len(placed), 8, dtype=torch.int32)
    gains = torch.zeros(z_columns, dtype=torch.float32, device=device)
    used = torch.zeros(z_columns, dtype=torch.uint8, device=device)
    v_width = v_pitch(k, num_bits) * (8 // num_bits)
    v_rows = torch.zeros(starts[-1], v_width, dtype=torch.int8, device=device)
    for start, bundle, part in zip(starts, plan.bundles, plan.v_bundles(v), strict=False):
        for columns, tile in bundle.column_tiles(part):
            v_rows[start : start + bundle.total_rank, columns] = tile
    u_views, gain_views = plan.u_slots(u), plan.gain_slots(gain)
    pieces, u_start = [], 0
    for entry, place in zip(slot_table, placed, strict=True):
        slot, rank, height = place.slot, place.slot.rank, len(u_views[place.index])
        padding = place.z_stop - place.z.stop
        stored = _store(F.pad(u_views[place.index].flatten(1), (0, padding)), num_bits, _U_HALF)
        pieces.append(stored.flatten())
        row_table[0, slot.rows] = u_start + stored.shape[1] * torch.arange(height)
        row_table[1, slot.rows], row_table[2, slot.rows] = place.z_start, place.z_stop
        u_start += stored.numel()
        v_ranks = slice(place.v_row, place.v_row + rank)
        v_table[0, v_ranks] = place.z_start + torch.arange(rank)
        v_table[1, v_ranks] = rank
        gains[place.z] = gain_views[place.index].flatten()
        used[place.z] = 1
        numbers = (place.v_row, rank, place.z_start, *_edges(plan.bundles[slot.bundle]))
        entry.copy_(torch.tensor([slot.rows.start, slot.rows.stop, *numbers, place.tiles]))
    tail = torch.zeros(_V_TAIL, dtype=torch.uint8, device=device)
    stored_v = torch.cat((_store(v_rows, num_bits, _V_HALF).flatten(), tail))
    tables = (row_table, v_table, _jobs(plan, starts), slot_table, _block_slots(placed, n_padded))
    return PlanarSidecar(
        torch.cat(pieces), stored_v, gains, used, *(table.to(device) for table in tables)
    )


def _require_4_bits(**factors: torch.Tensor) -> None:
    for name, values in factors.items():
        if values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
            raise KernelError(
                f"{name.upper()} factors outside [-8, 7] do not fit the 4 bits asked for."
            )


def _jobs(plan: SidecarPlan, starts: Sequence[int]) -> torch.Tensor:
    """Programs of the z kernel, int32 [J, 6]."""
    jobs: list[tuple[int, ...]] = []
    for start, stop, bundle in zip(starts[:-1], starts[1:], plan.bundles, strict=True):
        for row in range(start, stop, V_ROWS):
            for b, (first, end) in enumerate(pairwise(bundle.bounds)):
                cuts = [*range(first, end, MAX_JOB_COLUMNS), end]
                same_sums = (len(jobs), len(cuts) - 1)
                jobs += [(row, left, right, b, *same_sums) for left, right in pairwise(cuts)]
    return torch.tensor(jobs, dtype=torch.int32)


def _block_slots(placed: Sequence[_PlacedSlot], n_padded: int) -> torch.Tensor:
    """The slots each block of FOLD_ROWS rows meets, int32 [blocks, 2]."""
    ranges = []
    for start in range(0, n_padded, FOLD_ROWS):
        met = [
            index
            for index, place in enumerate(placed)
            if place.slot.rows.start < start + FOLD_ROWS and place.slot.rows.stop > start
        ]
        ranges.append((met[0], met[-1] + 1) if met else (0, 0))
    return torch.tensor(ranges, dtype=torch.int32)
