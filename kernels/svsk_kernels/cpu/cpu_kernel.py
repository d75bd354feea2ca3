# SPDX-License-Identifier: Apache-2.0
"""Whole layers on an x86 CPU with AVX2 or more, by the op ``svsk::cpu_linear`` of ``linear.cpp``.

The packed weight is decoded in registers or in the first-level cache for any number of rows of
activations: decoding costs less than it takes an ordinary product to read a 16-bit weight. There is
a path for AVX2, one for AVX-512 and one for AVX512-BF16; all run on the same tensors.

Run-time tensors; a *block* is 16 outputs (N is padded to whole blocks), a *pair* two neighbouring
inputs:

- codes: uint8, [blocks, K / 2, 16]: a byte holds both codes of a pair for one output, the first in
  the low nibble; of 8 bits [blocks, K, 16], two's complement; for products of bytes
  [blocks, K / 8, 16, 4], columns 0 to 3 of 8 in the low nibbles, 4 to 7 in the high ones;
- scale: [blocks, K / group, 16], int8 where rows have scales: row_scale, [blocks, 1, 16];
- U and V: bfloat16 *panels* [pairs, 16, 2]. A V panel is 16 ranks of one column tile. A U panel is
  one block's rows of one slot (zero for the block's other rows) times the slot's ranks in all
  column tiles;
- gain: float32 [V panels, 16];
- index: int32: the counts of V panels, of numbers z = gain * (V x) per row, and of blocks; per V
  panel its place in pairs of 16 outputs, the first column and the number of pairs; per V panel 16
  places in z or -1; per block the first of its U panels, and their total; per U panel its place,
  its place in z, and the number of pairs.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F

from svsk_kernels.codebook import code_bits, unpack_bytes
from svsk_kernels.cpu.build import cpu_ops_obstacle
from svsk_kernels.cpu.processor import instructions_for
from svsk_kernels.group_scales import expand_scales
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.sidecar_plan import SidecarPlan
from svsk_kernels.table_rows import TableRows

__all__ = ["CpuKernel", "cpu_ops_obstacle"]

_LANES: Final = 16
_PAIR: Final = 2 * _LANES  # elements of a panel per pair


class CpuKernel:
    """Runs a layer through ``svsk::cpu_linear``; a :class:`svsk_kernels.layer_kernel.LayerKernel`.

    Args:
        spec: the layer, bfloat16, float16 or float32. Batch invariant, a product takes at least
            the time of four rows.
        activations: ``exact``, or ``int8``: for the base a row's activations are rounded to
            ``s * round(x / s)`` by 64 columns, s their largest magnitude over 127, while the
            sidecar takes them as they come. Tables, and codes of 8 bits, stay exact.

    Raises:
        RuntimeError: the op cannot be built or loaded here.
    """

    def __init__(self, spec: LayerSpec, activations: Literal["exact", "int8"] = "exact") -> None:
        obstacle = self.obstacle(spec)
        if obstacle:
            raise RuntimeError(f"svsk::cpu_linear cannot be used: {obstacle}")
        self.spec = spec
        self.instructions = instructions_for(spec.dtype)
        self.bits = code_bits(spec.codebook)
        self.int8 = activations == "int8" and not spec.is_table
        self.table = TableRows(spec)
        self.label = self.instructions + (", int8 activations" if self.int8 else "")
        self.label += ", batch invariant" if spec.batch_invariant else ""
        self.names = (
            ("sidecar_u", "sidecar_v", "sidecar_gain", "sidecar_index") if spec.plan else ()
        )

    @staticmethod
    def obstacle(spec: LayerSpec) -> str | None:
        """Why the op does not take a layer on this machine.

        None when it does. The first call may compile it.
        """
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"activations are {spec.dtype}, the CPU kernel takes bfloat16, float16, float32"
        return cpu_ops_obstacle()

    def prepare(self, layer: Any) -> None:
        """Rearrange the loaded parameters, see the module; ``sidecar_index`` is added."""
        self.table.keep(layer)
        packed = layer.weight_packed.data
        stored = (unpack_bytes(packed) if self.bits == 8 else packed).view(torch.uint8)
        by_bytes = self.int8 and self.instructions == "avx512_bf16"
        tensors = {
            "weight_packed": _byte_blocks(stored) if by_bytes else _blocks(stored),
            "weight_scale": _blocks(layer.weight_scale.data),
        }
        if self.spec.row_scaled:
            tensors["weight_row_scale"] = _blocks(layer.weight_row_scale.data)
        if self.spec.plan:
            loaded = (layer.sidecar_u.data, layer.sidecar_v.data, layer.sidecar_gain.data)
            tensors |= dict(zip(self.names, _prepare_sidecar(self.spec.plan, *loaded), strict=True))
        replace_parameters(layer, tensors)

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W_hat^T + bias``: [M, N] from [M, K], both of the layer's dtype."""
        sidecar = [getattr(layer, name) for name in self.names] or [None] * 4
        y: torch.Tensor = torch.ops.svsk.cpu_linear(
            x,
            layer.weight_packed,
            layer.weight_scale,
            layer.weight_row_scale if self.spec.row_scaled else None,
            bias,
            *sidecar,
            self.spec.n,
            self.spec.group_size,
            self.bits,
            self.spec.codebook == "quad8",
            self.instructions,
            self.int8,
            self.spec.batch_invariant,
        )
        return y

    def rows(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows [M, K] of ``W_hat``, of the layer's dtype."""
        block, lane = ids // _LANES, ids % _LANES
        codes = layer.weight_packed[block, :, lane]
        if self.bits == 8:
            codes = codes.view(torch.int8)
        else:
            codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).to(torch.int8) - 8
        scale = layer.weight_scale[block, :, lane]
        if self.spec.row_scaled:
            scale = expand_scales(scale, layer.weight_row_scale[block, :, lane])
        return self.table(layer, ids, codes, scale)


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """[N, C] to contiguous [blocks, C, 16], padded with zeros."""
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % _LANES))
    return padded.view(-1, _LANES, rows.shape[1]).transpose(1, 2).contiguous()


def _byte_blocks(packed: torch.Tensor) -> torch.Tensor:
    """Bytes of two codes [N, K / 2] to [blocks, K / 8, 16, 4] for products of bytes."""
    codes = torch.stack((packed & 15, packed >> 4), dim=2).view(packed.shape[0], -1, 2, 4)
    rows = F.pad(codes, (0, 0, 0, 0, 0, 0, 0, -packed.shape[0] % _LANES))
    both = rows[:, :, 0] | (rows[:, :, 1] << 4)
    return both.view(-1, _LANES, *both.shape[1:]).transpose(1, 2).contiguous()


def _panels(rows: torch.Tensor) -> torch.Tensor:
    """Integers [16 p, C] to bfloat16 panels [p, C / 2, 16, 2], C padded to even."""
    padded = F.pad(rows, (0, rows.shape[1] % 2)).to(torch.bfloat16)
    return padded.view(-1, _LANES, padded.shape[1] // 2, 2).permute(0, 2, 1, 3).contiguous()


@dataclass
class _Panels:
    """Panels of one factor while they are collected.

    ``entries`` are the index's three numbers per panel.
    """

    data: list[torch.Tensor] = field(default_factory=list)
    entries: list[tuple[int, int, int]] = field(default_factory=list)
    size: int = 0

    def add(self, panels: torch.Tensor, place: int) -> None:
        pairs = panels.shape[1]
        for _ in range(panels.shape[0]):
            self.entries.append((self.size, place, pairs))
            self.size += pairs
        self.data.append(panels.flatten())

    @property
    def flat(self) -> torch.Tensor:
        return torch.cat(self.data)


def _prepare_sidecar(
    plan: SidecarPlan, u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, V, gain and index as the op wants them, from the plan's flat tensors."""
    left, right = _Panels(), _Panels()
    blocks: list[int] = []  # of each U panel
    width = 0  # numbers z per row of activations so far
    # Place in z of each rank of a bundle's first column tile, and by how much it moves per tile.
    first = [torch.empty(bundle.total_rank, dtype=torch.int32) for bundle in plan.bundles]
    step = [torch.empty_like(starts) for starts in first]
    for slot, slot_u in zip(plan.slots, plan.u_slots(u), strict=True):
        row, rank = slot.rows.start, slot.rank
        first[slot.bundle][slot.ranks] = torch.arange(width, width + rank, dtype=torch.int32)
        step[slot.bundle][slot.ranks] = rank
        rows = slot_u.flatten(1)
        panels = _panels(F.pad(rows, (0, 0, row % _LANES, -slot.rows.stop % _LANES)))
        left.add(panels, width)
        blocks += range(row // _LANES, row // _LANES + panels.shape[0])
        width += rows.shape[1] + rows.shape[1] % 2  # a U panel takes z in pairs
    gains: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    views = zip(plan.bundles, plan.v_bundles(v), plan.gain_bundles(gain), strict=True)
    for number, (bundle, bundle_v, bundle_gain) in enumerate(views):
        pad = -bundle.total_rank % _LANES
        gains.append(F.pad(bundle_gain, (0, pad)).flatten())
        for tile, (columns, factors) in enumerate(bundle.column_tiles(bundle_v)):
            odd = columns.start % 2  # panels begin at an even column: no pair reaches beyond K
            right.add(_panels(F.pad(factors, (odd, 0, 0, pad))), columns.start - odd)
            places.append(F.pad(first[number] + tile * step[number], (0, pad), value=-1))
    order = sorted(range(len(blocks)), key=blocks.__getitem__)
    count = -(-plan.n // _LANES)
    starts = torch.bincount(torch.tensor(blocks), minlength=count).cumsum(0)
    parts = [
        torch.tensor([len(right.entries), width, count]),
        torch.tensor(right.entries).flatten(),
        *places,
        F.pad(starts, (1, 0)),
        torch.tensor([left.entries[panel] for panel in order]).flatten(),
    ]
    index = torch.cat([part.to(torch.int32) for part in parts])
    return left.flat, right.flat, torch.cat(gains), index
