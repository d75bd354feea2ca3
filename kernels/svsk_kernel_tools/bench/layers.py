# SPDX-License-Identifier: Apache-2.0
"""Random layers on any device, repacked for the GPU, with the reference to check them against."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from svsk_kernel_tools.bench.shapes import GROUP_SIZE, TILE_M, TILE_N, Shape, Variant
from svsk_kernel_tools.stack_linears import random_linear, stack_linears
from svsk_kernels.codebook import Codebook
from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.folded_product import matmul_folded
from svsk_kernels.gpu.launch import packed_matmul
from svsk_kernels.gpu.matmul_op import SvskMatmul
from svsk_kernels.gpu.repack_base import Base, plane_length
from svsk_kernels.gpu.repack_sidecar import PlanarSidecar, Tiles
from svsk_kernels.layer_kernel import LayerSpec
from svsk_kernels.naive import PlainLinear, naive_matmul
from svsk_kernels.tile_grid import TileGrid

__all__ = ["BenchLayer", "Part", "layer_of_shape", "random_layer"]


@dataclass(frozen=True)
class Part:
    """One linear of a layer."""

    n: int
    rank: int = 0
    bits: Literal[4, 8] = 8
    tile_m: int = TILE_M
    tile_n: int = TILE_N


@dataclass(frozen=True)
class BenchLayer:
    """A layer as the kernels take it, and the linears it was made of."""

    linears: tuple[PlainLinear, ...]  # empty in copies made for timing
    matmul: SvskMatmul
    tensors: dict[str, torch.Tensor]

    @property
    def spec(self) -> LayerSpec:
        """What decides the kernels."""
        return self.matmul.spec

    @cached_property
    def base(self) -> Base:
        """Codes and scales."""
        shape, tensors = self.spec, self.tensors
        quad8 = shape.codebook == "quad8"
        plane = plane_length(shape.k)
        return Base(
            tensors["words"],
            tensors["scale"],
            shape.n,
            shape.k,
            plane,
            shape.group_size,
            quad8,
            tensors.get("row_scale"),
        )

    @cached_property
    def sidecar(self) -> PlanarSidecar | None:
        """Factors and gains, None without a sidecar."""
        if self.spec.plan is None:
            return None
        return PlanarSidecar(*(self.tensors[f"sidecar_{name}"] for name in PlanarSidecar.names()))

    @cached_property
    def tiles(self) -> Tiles:
        """What all column tiles have in common."""
        return Tiles.of(self.spec.plan)

    def dispatched(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product [M, N] by the kernel that a model would use."""
        return self.matmul(x, self.tensors, bias)

    def run(
        self,
        x: torch.Tensor,
        choice: Choice,
        bias: torch.Tensor | None = None,
        asm: bool | None = None,
    ) -> torch.Tensor:
        """The product [M, N] by the kernel asked for.

        ``asm`` as for the launcher, without effect on ``fold``.
        """
        if choice.kernel == "fold":
            return matmul_folded(x, self.base, self.sidecar, self.spec.factor_bits, bias)
        return packed_matmul(
            x, self.base, self.sidecar, self.spec.factor_bits, bias, choice, self.tiles, asm=asm
        )

    def expected(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product in float64."""
        y = torch.cat([naive_matmul(x, linear) for linear in self.linears], dim=1)
        return y if bias is None else y + bias.double()

    def without_linears(self) -> "BenchLayer":
        """The same layer less what only the reference needs."""
        return replace(self, linears=())

    def batch_invariant(self) -> "BenchLayer":
        """The same layer, whose rows have the same bits whatever rows are beside them."""
        return replace(self, matmul=SvskMatmul(replace(self.spec, batch_invariant=True)))

    def copies(self, count: int) -> list["BenchLayer"]:
        """The layer and others like it at other addresses, ``count`` together, less its linears."""
        copies = [self.without_linears()]
        while len(copies) < count:
            tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
            copies.append(BenchLayer((), self.matmul, tensors))
        return copies


def random_layer(
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    parts: Sequence[Part],
    *,
    codebook: Codebook = "int4",
    group_size: int = GROUP_SIZE,
    row_scaled: bool = False,
    seed: int = 0,
) -> BenchLayer:
    """A layer of random linears that share an input of ``k`` columns, on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    linears = [
        random_linear(
            TileGrid(part.n, k, part.tile_m, part.tile_n),
            dtype,
            generator,
            codebook=codebook,
            group_size=group_size,
            rank=part.rank,
            factor_bits=part.bits,
            row_scaled=row_scaled,
        )
        for part in parts
    ]
    stacked = stack_linears(linears)
    matmul = SvskMatmul(stacked.spec)
    tensors = matmul.prepare(
        stacked.packed, stacked.scale, stacked.u, stacked.v, stacked.gain, stacked.row_scale
    )
    return BenchLayer(tuple(linears), matmul, tensors)


def layer_of_shape(
    shape: Shape, variant: Variant, dtype: torch.dtype, device: torch.device
) -> BenchLayer:
    """A random layer of one of the shapes that are timed."""
    return random_layer(
        shape.k,
        dtype,
        device,
        [Part(shape.n, variant.rank, variant.bits)],
        codebook=variant.codebook,
    )
