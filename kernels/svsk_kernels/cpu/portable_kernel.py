# SPDX-License-Identifier: Apache-2.0
"""A layer by PyTorch's own float32 product.

On every processor and device, in every dtype. Twice the base's memory.
"""

from typing import Any

import torch

import svsk_kernels.cpu.widened_op  # noqa: F401 - registers svsk::widened_linear
from svsk_kernels.codebook import code_values, unpack_codes_of
from svsk_kernels.group_scales import pop_scales
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.sidecar_op import prepare_sidecar
from svsk_kernels.table_rows import TableRows

__all__ = ["PortableKernel"]

_PARTS = {"int4": 1, "quad8": 8, "int8": 1}
"""A level times this is a whole number that int8 holds."""


class PortableKernel:
    """Runs a layer as int8 levels and float32 factors.

    A :class:`svsk_kernels.layer_kernel.LayerKernel`.

    Nothing is rounded before the result is: levels, scales and factors are exact in float32.

    Args:
        spec: the layer.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.plan = spec.plan.encode() if spec.plan else []
        self.table = TableRows(spec, "int8")  # the codes are levels, in units of the scales

    def prepare(self, layer: Any) -> None:
        """Replace the loaded parameters.

        ``weight_packed`` by int8 levels [N, K], the others by float32 tensors.
        """
        self.table.keep(layer)
        parts = _PARTS[self.spec.codebook]
        codes = unpack_codes_of(layer.weight_packed.data, self.spec.codebook)
        tensors = {
            "weight_packed": (code_values(codes, self.spec.codebook) * parts).to(torch.int8),
            "weight_scale": pop_scales(layer).float() / parts,
        }
        if self.spec.plan:
            loaded = (layer.sidecar_u.data, layer.sidecar_v.data, layer.sidecar_gain.data)
            names = ("sidecar_u", "sidecar_v", "sidecar_gain")
            tensors |= dict(zip(names, prepare_sidecar(*loaded, torch.float32), strict=True))
        replace_parameters(layer, tensors)

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W_hat^T + bias``: [M, N] from [M, K], both of the layer's dtype."""
        wide = x.float()
        y: torch.Tensor = torch.ops.svsk.widened_linear(
            wide, layer.weight_packed, layer.weight_scale
        )
        if self.plan:
            y = y + torch.ops.svsk.sidecar(
                wide, layer.sidecar_u, layer.sidecar_v, layer.sidecar_gain, self.plan
            )
        if bias is not None:
            y = y + bias
        return y.to(x.dtype)

    def rows(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows [M, K] of ``W_hat``, of the layer's dtype."""
        return self.table(layer, ids, layer.weight_packed[ids], layer.weight_scale[ids])
