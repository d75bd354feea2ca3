# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as a kernel for whole layers."""

import dataclasses
from typing import Any, Final

import torch

from svsk_kernels.gpu.matmul_op import SIDECAR_NAMES, SvskMatmul
from svsk_kernels.gpu.repack_base import plane_length, unpack_rows, unpack_scale_rows
from svsk_kernels.gpu.repack_sidecar import Tiles
from svsk_kernels.group_scales import expand_scales
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters, stored_tensors
from svsk_kernels.table_rows import TableRows

__all__ = ["TritonKernel"]

# Name of a run-time tensor to that of the layer's parameter.
_BASE: Final = {"words": "weight_packed", "scale": "weight_scale"}
_ROW_SCALE: Final = {"row_scale": "weight_row_scale"}


class TritonKernel:
    """Runs a layer through ``svsk::matmul``; a :class:`svsk_kernels.layer_kernel.LayerKernel`.

    Args:
        spec: the layer.
        device: where it runs.

    Raises:
        ValueError: the kernels do not take such a layer there.
    """

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        obstacle = self.obstacle(spec, device)
        if obstacle:
            raise ValueError(obstacle)
        self.matmul = SvskMatmul(_packable(spec))
        self.table = TableRows(spec)
        self.plane = plane_length(spec.k)
        self.row_scaled = spec.row_scaled
        self.sidecar = SIDECAR_NAMES if spec.plan else ()
        self.names = _BASE | (_ROW_SCALE if spec.row_scaled else {})
        self.names |= {name: name for name in self.sidecar}

    @staticmethod
    def obstacle(spec: LayerSpec, device: torch.device) -> str | None:
        """Why the kernels do not take a layer; None when they do."""
        works, reason = SvskMatmul.can_implement(_packable(spec), device)
        return None if works else reason

    def prepare(self, layer: Any) -> None:
        """Replace the parameters by run-time tensors, compile what any number of rows may need."""
        self.table.keep(layer)
        sidecar = (None, None, None)
        if self.matmul.spec.plan is not None:
            sidecar = (layer.sidecar_u.data, layer.sidecar_v.data, layer.sidecar_gain.data)
        row_scale = layer.weight_row_scale.data if self.matmul.spec.row_scaled else None
        tensors = self.matmul.prepare(
            layer.weight_packed.data, layer.weight_scale.data, *sidecar, row_scale
        )
        replace_parameters(layer, {self.names[name]: tensor for name, tensor in tensors.items()})
        self.matmul.warm_up(tensors, getattr(layer, "bias", None))

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W_hat^T + bias``: [M, N] from [M, K], both of the layer's dtype."""
        stored = stored_tensors(layer)
        y: torch.Tensor = torch.ops.svsk.matmul(
            x,
            stored["weight_packed"],
            stored["weight_scale"],
            stored["weight_row_scale"] if self.row_scaled else None,
            bias,
            [stored[name] for name in self.sidecar],
            self.matmul.code,
        )
        return y

    def rows(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows [M, K] of ``W_hat``, of the layer's dtype."""
        spec = self.matmul.spec
        codes = unpack_rows(layer.weight_packed, ids, spec.k, self.plane)
        groups = spec.k // spec.group_size
        if spec.row_scaled:
            words = layer.weight_scale
            scale_codes = unpack_scale_rows(words, ids, groups, self.plane, spec.group_size)
            scale = expand_scales(scale_codes, layer.weight_row_scale[ids].unsqueeze(1))
        else:
            scale = layer.weight_scale[:groups, ids].T
        return self.table(layer, ids, codes, scale)


def _packable(spec: LayerSpec) -> LayerSpec:
    """4-bit factors stay packed only where tiles are aligned.

    Elsewhere the kernels would take too many registers.
    """
    return spec if Tiles.of(spec.plan).aligned else dataclasses.replace(spec, factor_bits=8)
