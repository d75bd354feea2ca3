# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as products: shapes, grids and workspaces.

Classes hold what does not change from call to call, worked out once for the layers that Triton
cannot tell apart; they keep no tensors. Functions of the same arguments prepare and call.
"""

from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
import triton.language as tl

from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.counters import COUNTERS, Meeting, counters
from svsk_kernels.gpu.decode import decode_kernel
from svsk_kernels.gpu.gemm import gemm_kernel
from svsk_kernels.gpu.prepared_launch import INTERPRETED, PreparedLaunch, Where, current
from svsk_kernels.gpu.repack_base import Base
from svsk_kernels.gpu.repack_sidecar import PlanarSidecar, Tiles, v_pitch
from svsk_kernels.gpu.shrink import shrink_kernel
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "INTERPRETED",
    "Base",
    "PackedProduct",
    "aligned",
    "compiled_types",
    "counters",
    "matmul_constants",
    "packed_matmul",
    "product_type",
    "shrink",
    "shrink_constants",
    "shrink_warps",
]

_FARTHEST: Final = 1 << 31
"""Elements within a block of tokens: where planes are joined, offsets there have 32 bits."""

_TYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_type(dtype: torch.dtype) -> Any:
    """Triton's dtype of matrix products: that of the activations, float32 in the interpreter."""
    return tl.float32 if INTERPRETED else _TYPES[dtype]


def compiled_types(dtype: torch.dtype, asm: bool | None) -> dict[str, Any]:
    """Dtype of the products, and whether codes are unpacked by inline PTX."""
    native = not INTERPRETED and torch.version.hip is None
    return {
        "DTYPE": product_type(dtype),
        "ASM": native if asm is None else asm,
    }


def _options(choice: Choice, pdl: bool = False) -> dict[str, Any]:
    """Compiler options."""
    options: dict[str, Any] = {"num_warps": choice.num_warps, "enable_fp_fusion": True}
    return options | ({"launch_pdl": True} if pdl else {})


def x_stride(x: torch.Tensor) -> int:
    """Distance of rows.

    A single row may have any, which would have the kernels compiled again for it.
    """
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def shrink_warps(tiles: Tiles) -> int:
    """Warps of the shrink kernel: masks of single columns take the registers of twice as many."""
    return 4 if tiles.aligned else 8


def shrink_constants(block_m: int, num_bits: int, tiles: Tiles, pdl: bool) -> dict[str, Any]:
    """Compile-time constants of the shrink kernel, its dtype left out."""
    stages = 2 if num_bits == 4 and block_m == 32 else 3
    return {
        "BLOCK_M": block_m,
        "BITS": num_bits,
        "LONG_TILES": tiles.long,
        "ALIGNED": tiles.aligned,
        "PDL": pdl,
        "STAGES": stages if tiles.aligned else 1,  # single columns are not copied ahead
    }


def matmul_constants(
    choice: Choice, sidecar_bits: int, has_bias: bool, pdl: bool
) -> dict[str, Any]:
    """Compile-time constants of the decode and gemm kernels, those of layout and dtype left out."""
    constants = {
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "STEP": choice.step,
        "SIDECAR_BITS": sidecar_bits,
        "HAS_BIAS": has_bias,
        "STAGES": choice.num_stages,
        "JOIN": choice.join,
    }
    if choice.kernel == "decode":
        constants |= {
            "SPLIT_K": choice.split_k,
            "SCALE_WEIGHTS": choice.block_m >= 64,
            "PDL": pdl and sidecar_bits > 0,
        }
    return constants


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether all begin at multiples of 16 bytes."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses % 16


class Call(NamedTuple):
    """What the launches of one product share."""

    where: Where  # device and stream
    shared: Meeting  # the stream's counters
    stride: int  # distance of the rows of x
    alike: bool  # of launches: as far as tensors given and the stride decide it

    @classmethod
    def of(cls, x: torch.Tensor, *tensors: torch.Tensor | None) -> "Call":
        """Of activations [M, K], and all tensors that are not allocated for the product."""
        where, stride = current(), x_stride(x)
        alike = aligned(x, *tensors) and not stride % 16 and stride < 1 << 31
        return cls(where, counters.of_stream(x.device, where.stream), stride, alike)


class Shrink:
    """``z = gain * (V x)``, prepared for the layers whose sidecars are like one.

    Args:
        sidecar: run-time tensors, of which the shapes are taken.
        num_bits: 4 or 8, as they were packed.
        tiles: what all column tiles have in common.
        k: inputs K.
        dtype: of the activations.
        pdl: let the next kernel start beside this one.
        block: tokens of a program; None for few where there are few.
    """

    def __init__(
        self,
        sidecar: PlanarSidecar,
        num_bits: int,
        tiles: Tiles,
        k: int,
        dtype: torch.dtype,
        *,
        pdl: bool = False,
        block: int | None = None,
    ) -> None:
        self.long, self.jobs, self.columns = tiles.long, len(sidecar.jobs), len(sidecar.gain)
        self._sizes = (v_pitch(k, num_bits), sidecar.v_table.shape[1], self.columns)
        # with odd edges, masks for 32 tokens would not fit the registers
        self._blocks = (block or 16, block or (32 if tiles.aligned else 16))
        options = {"num_warps": shrink_warps(tiles), "enable_fp_fusion": True}
        dtypes = {"DTYPE": product_type(dtype)}
        self._few, self._many = (
            PreparedLaunch(
                shrink_kernel, shrink_constants(block, num_bits, tiles, pdl) | dtypes, options
            )
            for block in self._blocks
        )

    def __call__(self, x: torch.Tensor, sidecar: PlanarSidecar, call: Call) -> torch.Tensor:
        """[M, C] in the dtype of ``x``; padding columns hold anything.

        Args:
            x: [M, K], its last axis contiguous.
            sidecar: of the layer.
            call: with ``x``.
        """
        m, jobs = x.shape[0], self.jobs
        block = self._blocks[m > 16]
        blocks = ceil_div(m, block)
        z = x.new_empty(m, self.columns)
        partial, counts = call.shared.unused, call.shared.shrink
        if self.long:
            partial = x.new_empty(jobs * m * 16, dtype=torch.float32)
            if jobs * blocks > COUNTERS:
                counts = x.new_zeros(jobs * blocks, dtype=torch.int32)
        tensors = (x, sidecar.v, sidecar.gain, sidecar.v_table, sidecar.jobs, z, partial, counts)
        launch = self._many if m > 16 else self._few
        arguments = (*tensors, m, call.stride, *self._sizes)
        launch(call.where, (jobs, blocks, 1), arguments, call.alike)
        return z


def shrink(
    x: torch.Tensor, sidecar: PlanarSidecar, num_bits: int, tiles: Tiles, *, pdl: bool = False
) -> torch.Tensor:
    """:class:`Shrink`, prepared and called."""
    product = Shrink(sidecar, num_bits, tiles, x.shape[1], x.dtype, pdl=pdl)
    return product(x, sidecar, Call.of(x, *sidecar))


class PackedProduct:
    """``x W_hat^T + bias`` by the decode or the gemm kernel, prepared for layers like one.

    Args:
        base: of the layer; what counts are its sizes.
        sidecar: likewise; None for none.
        num_bits: of the factors as packed.
        choice: kernel and blocks; not ``fold``.
        tiles: what all column tiles have in common.
        dtype: of the activations, bfloat16 or float16.
        has_bias: whether there is a bias.
        asm: unpack by inline PTX; None where it can be.
        shrink_block: tokens of a program that computes z; None for few where there are few.
    """

    def __init__(
        self,
        base: Base,
        sidecar: PlanarSidecar | None,
        num_bits: int,
        choice: Choice,
        tiles: Tiles,
        *,
        dtype: torch.dtype,
        has_bias: bool,
        asm: bool | None = None,
        shrink_block: int | None = None,
    ) -> None:
        self._decode, self._near = choice.kernel == "decode", choice.join
        self._block_m, self._blocks_n = choice.block_m, ceil_div(base.n, choice.block_n)
        pdl = self._decode and choice.pdl and not INTERPRETED and sidecar is not None
        self._shrink = (
            None
            if sidecar is None
            else Shrink(sidecar, num_bits, tiles, base.k, dtype, pdl=pdl, block=shrink_block)
        )
        steps = base.words.shape[1] // choice.step
        share = ceil_div(steps, choice.split_k)
        self._steps = (steps, share) if self._decode else (steps,)
        self._split = ceil_div(steps, share)  # no part is empty, which decode counts on
        self._n, self._n_padded = base.n, base.n_padded
        self._sizes, self._word_stride = (base.n, base.k, base.n_padded), base.words.stride(0)
        constants = (
            base.constants
            | compiled_types(dtype, asm)
            | matmul_constants(
                replace(choice, split_k=self._split),
                num_bits if sidecar is not None else 0,
                has_bias,
                pdl,
            )
        )
        kernel = decode_kernel if self._decode else gemm_kernel
        self._launch = PreparedLaunch(kernel, constants, _options(choice, pdl))

    def __call__(
        self,
        x: torch.Tensor,
        base: Base,
        sidecar: PlanarSidecar | None,
        bias: torch.Tensor | None,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Contiguous [M, N] of the dtype of ``x``.

        Args:
            x: [M, K], its last axis contiguous.
            base: of the layer.
            sidecar: likewise.
            bias: [N] or None, as was said.
            y: where the result is written, at a multiple of 16 bytes; None for memory of its own.

        Raises:
            RuntimeError: more programs share their sums than there are counters.
        """
        m = x.shape[0]
        if self._near and x_stride(x) * self._block_m >= _FARTHEST:
            x = x.contiguous()
        call = Call.of(x, base.words, base.scale, base.row_scale, bias, *(sidecar or ()))
        # What decode writes is allocated before shrink's own workspace is freed: the two may run
        # side by side.
        y = x.new_empty(m, self._n) if y is None else y
        partial = call.shared.unused
        if self._split > 1:
            partial = x.new_empty(self._split * m * self._n_padded, dtype=torch.float32)
        side, z_stride = (x, x, x, x), call.stride
        if self._shrink is not None:
            assert sidecar is not None
            z, z_stride = self._shrink(x, sidecar, call), self._shrink.columns
            side = (sidecar.row_table, sidecar.u, z, sidecar.z_used)
        left = (x, base.words, base.scale, base.row_scale, x if bias is None else bias, *side, y)
        sizes = (m, *self._sizes, call.stride, self._word_stride, z_stride, *self._steps)
        rows, tokens = self._blocks_n, ceil_div(m, self._block_m)
        if not self._decode:
            self._launch(call.where, (tokens, rows, 1), (*left, *sizes), call.alike)
            return y
        if self._split > 1 and rows * tokens > COUNTERS:
            raise RuntimeError(
                f"{rows} x {tokens} programs with split columns need more than {COUNTERS} counters."
            )
        arguments = (*left, partial, call.shared.decode, *sizes)
        self._launch(call.where, (rows, self._split, tokens), arguments, call.alike)
        return y


def packed_matmul(
    x: torch.Tensor,
    base: Base,
    sidecar: PlanarSidecar | None,
    num_bits: int,
    bias: torch.Tensor | None,
    choice: Choice,
    tiles: Tiles,
    *,
    asm: bool | None = None,
) -> torch.Tensor:
    """:class:`PackedProduct`, prepared and called."""
    product = PackedProduct(
        base, sidecar, num_bits, choice, tiles, dtype=x.dtype, has_bias=bias is not None, asm=asm
    )
    return product(x, base, sidecar, bias)
