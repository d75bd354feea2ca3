# SPDX-License-Identifier: Apache-2.0
"""The sidecar's tensors in the order in which the GPU kernels read them, and back.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Final

import torch

from svsk_kernels.errors import KernelError
from svsk_kernels.gpu.repack_base import ROW_PAD
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "MAX_JOB_COLUMNS",
    "V_ROWS",
    "PlanarSidecar",
    "Tiles",
    "pack_sidecar",
    "unpack_sidecar",
    "v_pitch",
    "z_alignment",
]


V_ROWS: Final = 16
"""Rows of V that one program multiplies: the height of a tensor core's tile."""

MAX_JOB_COLUMNS: Final = 2048
"""Longest run of columns one program of the z kernel takes.

Longer tiles are split and summed in order.
"""

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


@dataclass(frozen=True)
class PlanarSidecar:
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
        return [field.name for field in fields(cls)]

    def to(self, device: torch.device) -> "PlanarSidecar":
        """A copy on a device."""
        return PlanarSidecar(*(getattr(self, name).to(device) for name in self.names()))


FOLD_ROWS: Final = 64
"""Rows per entry of ``block_slots``."""


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
class _Slot:
    """A slot with its place in the plan's tensors and in the run-time ones."""

    bundle: int
    row_start: int
    rows: int
    rank: int
    tiles: int
    u_start: int  # in the plan's flat u
    rank_start: int  # along R within the bundle
    z_start: int

    def columns(self, num_bits: int) -> int:
        """Its z columns with padding."""
        align = z_alignment(num_bits)
        return ceil_div(self.tiles * self.rank, align) * align


def _slots(plan: SidecarPlan, num_bits: int) -> list[_Slot]:
    """All slots in the order of their rows."""
    found, u_start = [], 0
    for index, bundle in enumerate(plan.bundles):
        rank_start = 0
        for group in bundle.groups:
            for number in range(group.slots):
                row = group.row_start + number * group.rows
                found.append(
                    _Slot(
                        index,
                        row,
                        group.rows,
                        group.rank,
                        bundle.num_col_tiles,
                        u_start,
                        rank_start,
                        0,
                    )
                )
                u_start += group.rows * bundle.num_col_tiles * group.rank
                rank_start += group.rank
    found.sort(key=lambda slot: slot.row_start)
    placed, z_start = [], 0
    for slot in found:
        placed.append(_Slot(**{**vars(slot), "z_start": z_start}))
        z_start += slot.columns(num_bits)
    return placed


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
    """4-bit integers int8 [..., multiple of 2 * half] as bytes, the first half of each pair in the low nibbles."""
    pairs = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2, half))
    packed: torch.Tensor = pairs[..., 0, :] | pairs[..., 1, :] << 4
    return packed.flatten(-2)


def _from_halves(stored: torch.Tensor, half: int) -> torch.Tensor:
    """Inverse of :func:`_halves`."""
    pairs = stored.unflatten(-1, (-1, half))
    return (torch.stack((pairs & 15, pairs >> 4), dim=-2).to(torch.int8) - 8).flatten(-3)


def _store(values: torch.Tensor, num_bits: int, half: int) -> torch.Tensor:
    return _halves(values, half) if num_bits == 4 else values.view(torch.uint8)


def _read(stored: torch.Tensor, num_bits: int, half: int) -> torch.Tensor:
    return _from_halves(stored, half) if num_bits == 4 else stored.view(torch.int8)


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
    slots, starts, device = _slots(plan, num_bits), _v_rows(plan), u.device
    columns = slots[-1].z_start + slots[-1].columns(num_bits)
    n_padded = ceil_div(plan.n, ROW_PAD) * ROW_PAD
    row_table = torch.tensor([[0], [_NO_COLUMN], [0]], dtype=torch.int32).repeat(1, n_padded)
    v_table = torch.tensor([[-1], [0]], dtype=torch.int32).repeat(1, starts[-1])
    gains = torch.zeros(columns, dtype=torch.float32, device=device)
    used = torch.zeros(columns, dtype=torch.uint8, device=device)
    slot_table = torch.zeros(len(slots), 8, dtype=torch.int32)
    pitch = v_pitch(k, num_bits)
    v_all = torch.zeros(
        starts[-1], pitch * (2 if num_bits == 4 else 1), dtype=torch.int8, device=device
    )
    for start, bundle, part in zip(starts, plan.bundles, _bundle_views(plan, v), strict=False):
        for b, (first, stop) in enumerate(pairwise(bundle.bounds)):
            v_all[start : start + bundle.total_rank, first:stop] = part[b, :, : stop - first]
    gain_views = list(_bundle_views(plan, gain, of_gain=True))
    pieces, place = [], 0
    for index, slot in enumerate(slots):
        width, taken = slot.columns(num_bits), slot.tiles * slot.rank
        rows = slice(slot.row_start, slot.row_start + slot.rows)
        values = u.new_zeros(slot.rows, width)
        values[:, :taken] = u[slot.u_start : slot.u_start + slot.rows * taken].view(
            slot.rows, taken
        )
        stored = _store(values, num_bits, _U_HALF)
        pieces.append(stored.flatten())
        row_table[0, rows] = place + stored.shape[1] * torch.arange(slot.rows, dtype=torch.int32)
        row_table[1, rows], row_table[2, rows] = slot.z_start, slot.z_start + width
        place += stored.numel()
        v_row = starts[slot.bundle] + slot.rank_start
        ranks = slice(v_row, v_row + slot.rank)
        v_table[0, ranks] = slot.z_start + torch.arange(slot.rank, dtype=torch.int32)
        v_table[1, ranks] = slot.rank
        z = slice(slot.z_start, slot.z_start + taken)
        gains[z] = gain_views[slot.bundle][
            :, slot.rank_start : slot.rank_start + slot.rank
        ].flatten()
        used[z] = 1
        edges = _edges(plan.bundles[slot.bundle])
        slot_table[index] = torch.tensor(
            [
                slot.row_start,
                slot.row_start + slot.rows,
                v_row,
                slot.rank,
                slot.z_start,
                *edges,
                slot.tiles,
            ]
        )
    tail = torch.zeros(_V_TAIL, dtype=torch.uint8, device=device)
    stored_v = torch.cat((_store(v_all, num_bits, _V_HALF).flatten(), tail))
    tables = (row_table, v_table, _jobs(plan, starts), slot_table, _block_slots(slots, n_padded))
    return PlanarSidecar(
        torch.cat(pieces), stored_v, gains, used, *(table.to(device) for table in tables)
    )


def _require_4_bits(**factors: torch.Tensor) -> None:
    for name, values in factors.items():
        if values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
            raise KernelError(
                f"{name.upper()} factors outside [-8, 7] do not fit the 4 bits asked for."
            )


def unpack_sidecar(
    packed: PlanarSidecar, plan: SidecarPlan, k: int, num_bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse of :func:`pack_sidecar`: ``u``, ``v`` and ``gain``, flat, in the plan's order."""
    slots, starts = _slots(plan, num_bits), _v_rows(plan)
    u = torch.zeros(plan.u_numel, dtype=torch.int8, device=packed.u.device)
    v = torch.zeros(plan.v_numel, dtype=torch.int8, device=packed.u.device)
    gain = torch.zeros(plan.gain_numel, dtype=torch.float32, device=packed.u.device)
    pitch = v_pitch(k, num_bits)
    rows_of_v = _read(packed.v[: starts[-1] * pitch].view(starts[-1], pitch), num_bits, _V_HALF)
    for start, bundle, part in zip(starts, plan.bundles, _bundle_views(plan, v), strict=False):
        for b, (first, stop) in enumerate(pairwise(bundle.bounds)):
            part[b, :, : stop - first] = rows_of_v[start : start + bundle.total_rank, first:stop]
    gain_views, place = list(_bundle_views(plan, gain, of_gain=True)), 0
    for slot in slots:
        taken = slot.tiles * slot.rank
        pitch = slot.columns(num_bits) // (2 if num_bits == 4 else 1)
        stored = packed.u[place : place + slot.rows * pitch].view(slot.rows, pitch)
        place += stored.numel()
        u[slot.u_start : slot.u_start + slot.rows * taken] = _read(stored, num_bits, _U_HALF)[
            :, :taken
        ].flatten()
        view = gain_views[slot.bundle][:, slot.rank_start : slot.rank_start + slot.rank]
        view.copy_(packed.gain[slot.z_start : slot.z_start + taken].view(slot.tiles, slot.rank))
    return u, v, gain


def _bundle_views(
    plan: SidecarPlan, flat: torch.Tensor, of_gain: bool = False
) -> Iterator[torch.Tensor]:
    """Each bundle's part of the plan's flat ``v`` [B, R, width] or ``gain`` [B, R]."""
    start = 0
    for bundle in plan.bundles:
        shape: Sequence[int] = bundle.gain_shape if of_gain else bundle.v_shape
        part = flat[start : start + (bundle.gain_numel if of_gain else bundle.v_numel)].view(*shape)
        start += part.numel()
        yield part


def _jobs(plan: SidecarPlan, starts: Sequence[int]) -> torch.Tensor:
    """Programs of the z kernel, int32 [J, 6]."""
    jobs: list[tuple[int, ...]] = []
    for start, stop, bundle in zip(starts[:-1], starts[1:], plan.bundles, strict=True):
        for row in range(start, stop, V_ROWS):
            for b, (first, end) in enumerate(pairwise(bundle.bounds)):
                cuts = [*range(first, end, MAX_JOB_COLUMNS), end]
                own = len(jobs)
                jobs += [
                    (row, left, right, b, own, len(cuts) - 1) for left, right in pairwise(cuts)
                ]
    return torch.tensor(jobs, dtype=torch.int32)


def _block_slots(slots: Sequence[_Slot], n_padded: int) -> torch.Tensor:
    """The slots each block of FOLD_ROWS rows meets, int32 [blocks, 2]."""
    found = []
    for start in range(0, n_padded, FOLD_ROWS):
        met = [
            index
            for index, slot in enumerate(slots)
            if slot.row_start < start + FOLD_ROWS and slot.row_start + slot.rows > start
        ]
        found.append((met[0], met[-1] + 1) if met else (0, 0))
    return torch.tensor(found, dtype=torch.int32)
