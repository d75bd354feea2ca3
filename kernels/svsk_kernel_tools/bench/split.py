# SPDX-License-Identifier: Apache-2.0
"""What a model would do without fused kernels.

vLLM's Marlin kernel for the base, the sidecar apart.
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import torch

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernel_tools.bench.layers import BenchLayer
from svsk_kernel_tools.stack_linears import pack_words
from svsk_kernels.gpu.launch import shrink
from svsk_kernels.gpu.repack_sidecar import PlanarSidecar, Tiles
from svsk_kernels.naive import naive_matmul

__all__ = ["SplitLayer", "vllm_missing"]

_U_STEP: Final = {8: 2.0**-7, 4: 2.0**-3}
"""What z is divided by and U must be multiplied by, see ``svsk_kernels.gpu.primitives.u_step``."""

_BOUND: Final = 1e-2


def vllm_missing() -> str | None:
    """Why vLLM's Marlin kernel cannot be had, or None if it can."""
    try:
        from vllm import _custom_ops  # noqa: F401
        from vllm.model_executor.layers.quantization.utils import marlin_utils  # noqa: F401
        from vllm.scalar_type import scalar_types  # noqa: F401
    except Exception as error:  # a broken vLLM raises anything
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True)
class SplitLayer:
    """One int4 linear for Marlin, its sidecar for the shrink kernel and batched products."""

    n: int
    k: int
    base: dict[str, torch.Tensor]
    sidecar: PlanarSidecar | None
    bits: int
    tiles: Tiles
    u: torch.Tensor | None  # [A, B * rank, tile rows], zero in rows beyond N
    columns: int  # z columns of a row of tiles, with padding

    @classmethod
    def checked(cls, layer: BenchLayer) -> "SplitLayer | str":
        """The split form of a layer with one linear, or why there is none."""
        try:
            split = cls._of(layer)
            shape = (5, layer.spec.k)
            x = torch.randn(shape, device=layer.tensors["words"].device).to(layer.matmul.spec.dtype)
            error = relative_error(split.run(x), naive_matmul(x, layer.linears[0]))
        except Exception as failure:
            # vLLM's interfaces change, and its kernels refuse in their own ways.
            return f"{type(failure).__name__}: {failure}"[:300]
        return (
            split if error < _BOUND else f"relative error {error:.1e}, expected less than {_BOUND}"
        )

    @classmethod
    def _of(cls, layer: BenchLayer) -> "SplitLayer":
        linear = layer.linears[0]
        grid = linear.grid
        base = _marlin_tensors(linear.codes, linear.scale, linear.group_size)
        common = (grid.n, grid.k, base, layer.sidecar, layer.spec.factor_bits, layer.tiles)
        if linear.u is None or layer.sidecar is None:
            return cls(*common, None, 0)
        tile, tiles = grid.tile_rows, grid.num_row_tiles
        u = linear.u.new_zeros(tiles * tile, linear.u[0].numel(), dtype=layer.matmul.spec.dtype)
        u[: grid.n] = linear.u.flatten(1).to(u.dtype) * _U_STEP[layer.spec.factor_bits]
        columns = layer.sidecar.gain.numel() // tiles
        return cls(*common, u.view(tiles, tile, -1).transpose(1, 2).contiguous(), columns)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """``x W_hat^T``, [M, N]."""
        y = _marlin(x, self.base, self.n, self.k)
        if self.sidecar is None or self.u is None:
            return y
        tiles, width, rows = self.u.shape
        z = (
            shrink(x, self.sidecar, self.bits, self.tiles)
            .view(-1, tiles, self.columns)[:, :, :width]
            .transpose(0, 1)
        )
        whole = self.n // rows  # the last row of tiles may have fewer rows
        if whole:
            out = y[:, : whole * rows].unflatten(1, (whole, rows)).transpose(0, 1)
            out.baddbmm_(z[:whole], self.u[:whole])
        if whole < tiles:
            y[:, whole * rows :].addmm_(z[whole], self.u[whole, :, : self.n - whole * rows])
        return y

    def copy(self) -> "SplitLayer":
        """The same at other addresses; the locks stay shared."""
        locks = self.base["workspace"]
        return deepcopy(self, {id(locks): locks})


def _call(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call with those arguments that this version of vLLM knows."""
    parameters = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in parameters})


def _marlin_tensors(
    codes: torch.Tensor, scale: torch.Tensor, group_size: int
) -> dict[str, torch.Tensor]:
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    (n, k), device = codes.shape, codes.device
    none = torch.empty(0, dtype=torch.int32, device=device)
    words = pack_words(codes).T.contiguous()  # GPTQ: [K / 8, N], eight codes of a column
    weight = _call(
        _custom_ops.gptq_marlin_repack,
        b_q_weight=words,
        perm=none,
        size_k=k,
        size_n=n,
        num_bits=4,
        is_a_8bit=False,
    )
    scales = _call(
        marlin_utils.marlin_permute_scales,
        s=scale.T.contiguous(),
        size_k=k,
        size_n=n,
        group_size=group_size,
    )
    workspace = marlin_utils.marlin_make_workspace_new(device)
    return {"weight": weight, "scale": scales, "workspace": workspace, "none": none}


def _marlin(x: torch.Tensor, base: dict[str, torch.Tensor], n: int, k: int) -> torch.Tensor:
    from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear
    from vllm.scalar_type import scalar_types

    none = base["none"]
    product: torch.Tensor = _call(
        apply_gptq_marlin_linear,
        input=x,
        weight=base["weight"],
        weight_scale=base["scale"],
        weight_zp=none,
        g_idx=none,
        g_idx_sort_indices=none,
        workspace=base["workspace"],
        wtype=scalar_types.uint4b8,
        output_size_per_partition=n,
        input_size_per_partition=k,
        is_k_full=True,
    )
    return product
