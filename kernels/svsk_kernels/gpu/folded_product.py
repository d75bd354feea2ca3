# SPDX-License-Identifier: Apache-2.0
"""Products of many tokens: the weight written out some rows at a time, and PyTorch's own product.

As in :mod:`svsk_kernels.gpu.launch`, classes are prepared once for layers that Triton cannot tell
apart, and keep no tensors.
"""

from typing import Any, Final

import torch

from svsk_kernels.gpu.fold import fold_kernel
from svsk_kernels.gpu.launch import aligned, compiled_types
from svsk_kernels.gpu.prepared_launch import PreparedLaunch, Where, current
from svsk_kernels.gpu.repack_base import Base
from svsk_kernels.gpu.repack_sidecar import FOLD_ROWS, PlanarSidecar, rows_at_a_time, v_pitch
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "FOLD_WARPS",
    "FoldedProduct",
    "fold",
    "fold_constants",
    "matmul_folded",
]

FOLD_WARPS: Final = 8


def fold_constants(sidecar_bits: int) -> dict[str, Any]:
    """Compile-time constants of the fold kernel, those of layout and dtype left out."""
    return {"BLOCK_N": FOLD_ROWS, "SIDECAR_BITS": sidecar_bits}


class Fold:
    """Some rows of ``W_hat`` rounded once, prepared for layers like one.

    Args:
        base: of the layer; what counts are its sizes.
        sidecar: likewise; None for none.
        num_bits: of the factors as packed.
        dtype: bfloat16 or float16.
        asm: see :class:`svsk_kernels.gpu.launch.PackedProduct`.
    """

    def __init__(
        self,
        base: Base,
        sidecar: PlanarSidecar | None,
        num_bits: int,
        dtype: torch.dtype,
        *,
        asm: bool | None = None,
    ) -> None:
        self._dtype, self._blocks_k = dtype, base.k_padded // (4 * base.plane)
        self._sizes = (base.k, base.n_padded, base.words.stride(0), v_pitch(base.k, num_bits))
        constants = (
            fold_constants(num_bits if sidecar is not None else 0)
            | base.constants
            | compiled_types(dtype, asm)
        )
        options = {"num_warps": FOLD_WARPS, "enable_fp_fusion": True}
        self._launch = PreparedLaunch(fold_kernel, constants, options)

    def __call__(
        self, base: Base, sidecar: PlanarSidecar | None, rows: slice, where: Where, alike: bool
    ) -> torch.Tensor:
        """[rows, K]; a view into a tensor with as many rows as whole blocks need.

        Args:
            base: of the layer.
            sidecar: likewise.
            rows: its start a multiple of FOLD_ROWS; its stop at most N.
            where: :func:`svsk_kernels.gpu.prepared_launch.current`.
            alike: see :class:`svsk_kernels.gpu.prepared_launch.PreparedLaunch`.
        """
        count = rows.stop - rows.start
        blocks = ceil_div(count, FOLD_ROWS)
        scale = base.scale
        out = scale.new_empty(blocks * FOLD_ROWS, base.k, dtype=self._dtype)
        tensors: tuple[torch.Tensor, ...] = (scale,) * 6
        if sidecar is not None:
            tensors = (
                sidecar.row_table,
                sidecar.u,
                sidecar.v,
                sidecar.gain,
                sidecar.slot_table,
                sidecar.block_slots,
            )
        arguments = (base.words, scale, base.row_scale, *tensors, out, rows.start, *self._sizes)
        self._launch(where, (blocks, self._blocks_k, 1), arguments, alike)
        return out[:count]


def fold(
    base: Base,
    sidecar: PlanarSidecar | None,
    num_bits: int,
    dtype: torch.dtype,
    rows: slice,
    *,
    asm: bool | None = None,
) -> torch.Tensor:
    """:class:`Fold`, prepared and called."""
    return Fold(base, sidecar, num_bits, dtype, asm=asm)(base, sidecar, rows, current(), False)


class FoldedProduct:
    """``x W_hat^T + bias`` by folding some rows at a time and an ordinary matrix product.

    Arguments are those of :class:`Fold`.
    """

    def __init__(
        self, base: Base, sidecar: PlanarSidecar | None, num_bits: int, dtype: torch.dtype
    ) -> None:
        self._fold = Fold(base, sidecar, num_bits, dtype)
        self._n, self._rows = base.n, rows_at_a_time(base.k, dtype.itemsize)

    def __call__(
        self,
        x: torch.Tensor,
        base: Base,
        sidecar: PlanarSidecar | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Contiguous [M, N] of the dtype of ``x``.

        Arguments as of :class:`svsk_kernels.gpu.launch.PackedProduct`.
        """
        n, rows = self._n, self._rows
        where, alike = current(), aligned(base.words, base.scale, base.row_scale, *(sidecar or ()))
        if rows >= n:
            weight = self._fold(base, sidecar, slice(0, n), where, alike)
            return torch.nn.functional.linear(x, weight, bias)
        y = x.new_empty(x.shape[0], n)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            weight = self._fold(base, sidecar, part, where, alike)
            if bias is None:
                torch.mm(x, weight.T, out=y[:, part])
            else:
                torch.addmm(bias[part], x, weight.T, out=y[:, part])
        return y


def matmul_folded(
    x: torch.Tensor,
    base: Base,
    sidecar: PlanarSidecar | None,
    num_bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """:class:`FoldedProduct`, prepared and called."""
    return FoldedProduct(base, sidecar, num_bits, x.dtype)(x, base, sidecar, bias)
