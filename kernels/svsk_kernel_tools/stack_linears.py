# SPDX-License-Identifier: Apache-2.0
"""Layers for tests and benchmarks.

Random linears, and linears that share an input stacked into one layer as an inference engine does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from svsk_kernels.codebook import Codebook, code_bits
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.naive import PlainLinear
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup, append_slot
from svsk_kernels.tile_grid import TileGrid

__all__ = ["StackedLinear", "pack_words", "random_linear", "stack_linears"]


@dataclass(frozen=True)
class StackedLinear:
    """A layer as loaders leave it, before a kernel repacks it.

    Factors and gains flat, in the plan's order.
    """

    spec: LayerSpec
    packed: torch.Tensor  # int32 [N, K / 8], K / 4 of 8-bit codes
    scale: torch.Tensor  # [N, K / g]; int8 where the spec says row_scaled
    u: torch.Tensor  # int8
    v: torch.Tensor  # int8
    gain: torch.Tensor  # float32
    row_scale: torch.Tensor | None = None  # [N, 1] where the spec says row_scaled

    def module(self) -> torch.nn.Module:
        """The layer with the parameters that :meth:`LayerKernel.prepare` reads."""
        tensors = {"weight_packed": self.packed, "weight_scale": self.scale}
        if self.row_scale is not None:
            tensors["weight_row_scale"] = self.row_scale
        if self.spec.plan:
            tensors |= {"sidecar_u": self.u, "sidecar_v": self.v, "sidecar_gain": self.gain}
        layer = torch.nn.Module()
        replace_parameters(layer, tensors)
        return layer


def random_linear(
    grid: TileGrid,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    codebook: Codebook = "int4",
    group_size: int = 64,
    rank: int = 0,
    factor_bits: Literal[4, 8] = 8,
    row_scaled: bool = False,
) -> PlainLinear:
    """Every code, scales of both signs, full-range factors, on the generator's device.

    Row-scaled ones have every scale code, -128 to 127, and powers of two of both signs for rows.

    Gains make the sidecar about as large as the base, so that a mistake in either shows.
    """

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(
            low, high, shape, generator=generator, dtype=torch.int8, device=generator.device
        )

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    half = 1 << code_bits(codebook) - 1
    codes = integers(-half, half, grid.n, grid.k)
    row_scale = None
    if row_scaled:
        scale = integers(-128, 128, grid.n, grid.k // group_size)
        # about as large as the scales of one level: codes are 74 on average
        sign = integers(0, 2, grid.n, 1) * 2 - 1
        row_scale = (sign * 2.0 ** integers(-13, -10, grid.n, 1)).to(dtype)
    else:
        scale = (normal(grid.n, grid.k // group_size) * 0.02).to(dtype)
    if not rank:
        return PlainLinear(codes, scale, codebook, grid, row_scale=row_scale)
    rows, cols = grid.num_row_tiles, grid.num_col_tiles
    limit = 8 if factor_bits == 4 else 127
    u = integers(-limit, limit, grid.n, cols, rank)
    v = integers(-limit, limit, rows, rank, grid.k)
    gain = normal(rows, cols, rank) * (0.1 / limit**2)
    return PlainLinear(codes, scale, codebook, grid, u, v, gain, factor_bits, row_scale)


def stack_linears(
    linears: Sequence[PlainLinear], dtype: torch.dtype | None = None
) -> StackedLinear:
    """Stack linears along their rows.

    Args:
        linears: of one K, group size and codebook, with one or two levels of scales; ranks, tiles
            and factor bits may differ.
        dtype: of the layer and its scales; None for that of the first linear's scales.

    Raises:
        ValueError: their K, group sizes, codebooks or levels of scales differ.
    """
    first = linears[0]
    columns = {
        (linear.grid.k, linear.group_size, linear.codebook, linear.row_scale is not None)
        for linear in linears
    }
    if len(columns) > 1:
        raise ValueError(
            "The linears differ in columns, group size, codebook or in whether rows have scales:"
            f" {columns}."
        )
    bundles: dict[tuple[int, ...], list[tuple[PlainLinear, int]]] = {}  # linears and first rows
    row = 0
    for linear in linears:
        if linear.rank:
            bounds = (*range(0, linear.grid.k, linear.grid.tile_cols), linear.grid.k)
            bundles.setdefault(bounds, []).append((linear, row))
        row += linear.grid.n
    plan = SidecarPlan(row, tuple(_bundle(*entry) for entry in bundles.items()))
    members = [linear for entries in bundles.values() for linear, _ in entries]
    spec = LayerSpec(
        row,
        first.grid.k,
        first.group_size,
        first.codebook,
        dtype or (first.scale if first.row_scale is None else first.row_scale).dtype,
        plan if members else None,
        4 if members and all(linear.factor_bits == 4 for linear in members) else 8,
        first.row_scale is not None,
    )
    bits = code_bits(first.codebook)
    packed = torch.cat([pack_words(linear.codes, bits) for linear in linears])
    scale = torch.cat([linear.scale for linear in linears])
    row_scale = None
    if spec.row_scaled:
        row_scales = [linear.row_scale for linear in linears if linear.row_scale is not None]
        row_scale = torch.cat(row_scales).to(spec.dtype)
    else:
        scale = scale.to(spec.dtype)
    u, v, gain = plan.zeros(packed.device)
    sources = [(linear, a) for linear in members for a in range(linear.grid.num_row_tiles)]
    views = zip(plan.slots, plan.u_slots(u), plan.v_slots(v), plan.gain_slots(gain), strict=True)
    for (linear, a), (slot, slot_u, slot_v, slot_gain) in zip(sources, views, strict=True):
        assert linear.u is not None
        assert linear.v is not None
        assert linear.gain is not None
        slot_u.copy_(linear.u[linear.grid.row_slice(a)])
        slot_gain.copy_(linear.gain[a])
        for cols, tile in plan.bundles[slot.bundle].column_tiles(slot_v):
            tile.copy_(linear.v[a, :, cols])
    return StackedLinear(spec, packed, scale, u, v, gain, row_scale)


def _bundle(bounds: tuple[int, ...], entries: Sequence[tuple[PlainLinear, int]]) -> Bundle:
    """Slots of the rows of tiles of linears, each given with its first output row."""
    groups: list[SlotGroup] = []
    for linear, row in entries:
        for a in range(linear.grid.num_row_tiles):
            rows = linear.grid.row_slice(a)
            append_slot(groups, rows.stop - rows.start, linear.rank, row + rows.start)
    return Bundle(bounds, tuple(groups))


def pack_words(codes: torch.Tensor, num_bits: Literal[4, 8] = 4) -> torch.Tensor:
    """Codes int8 [N, K] as int32 words: ``svsk_vllm.format.pack_codes`` on torch alone."""
    count = 32 // num_bits
    packed = torch.zeros(
        codes.shape[0], codes.shape[1] // count, dtype=torch.int32, device=codes.device
    )
    for place in range(count):
        shifted = codes[:, place::count].to(torch.int32) + (1 << num_bits - 1)
        packed |= shifted << (num_bits * place)
    return packed
