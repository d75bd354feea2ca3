# SPDX-License-Identifier: Apache-2.0
"""A layer as its dequantised weight: the plainest way to serve it, to compare kernels with.

It takes the memory of the dense layer in the same dtype: about four times that of the checkpoint at
16 bits, eight times in float32.
"""

from typing import Any, Final

import torch

import svsk_kernels.cpu.widened_op  # noqa: F401 - registers svsk::widened_linear
from svsk_kernels.codebook import code_values, unpack_codes_of
from svsk_kernels.cpu.processor import product_dtype
from svsk_kernels.group_scales import expand_scales
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.sidecar_plan import SidecarPlan

__all__ = ["ReferenceKernel", "dequantize_layer"]

_LOADED: Final = (
    "weight_packed",
    "weight_scale",
    "weight_row_scale",
    "sidecar_u",
    "sidecar_v",
    "sidecar_gain",
)
"""Parameters that a loaded layer may have."""


class ReferenceKernel:
    """Runs a layer as an ordinary matrix product; a :class:`svsk_kernels.layer_kernel.LayerKernel`.

    Args:
        spec: the layer.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.widened = False  # whether products are in float32 although the weight is not

    def prepare(self, layer: Any) -> None:
        """Replace the parameters by ``weight``: ``W_hat`` rounded once to the layer's dtype."""
        sidecar = None
        if self.spec.plan:
            sidecar = (layer.sidecar_u.data, layer.sidecar_v.data, layer.sidecar_gain.data)
        scale = layer.weight_scale.data
        if self.spec.row_scaled:
            scale = expand_scales(scale, layer.weight_row_scale.data)
        weight = dequantize_layer(self.spec, layer.weight_packed.data, scale, sidecar)
        self.widened = product_dtype(self.spec.dtype, weight.device) != self.spec.dtype
        replace_parameters(layer, {"weight": weight.to(self.spec.dtype)})
        for name in _LOADED:
            if hasattr(layer, name):
                delattr(layer, name)

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W_hat^T + bias``: [M, N] from [M, K], both of the layer's dtype."""
        if not self.widened:
            return torch.nn.functional.linear(x, layer.weight, bias)
        y: torch.Tensor = torch.ops.svsk.widened_linear(x, layer.weight)
        return (y if bias is None else y + bias).to(x.dtype)

    def rows(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows [M, K] of the weight, of the layer's dtype."""
        found: torch.Tensor = layer.weight[ids]
        return found


def dequantize_layer(
    spec: LayerSpec,
    packed: torch.Tensor,
    scale: torch.Tensor,
    sidecar: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """``W_hat`` of a loaded layer.

    Args:
        spec: the layer.
        packed: int32 [N, K / 8], of codebook ``int8`` [N, K / 4].
        scale: floating [N, K / g], the scale of each group: expanded where ``spec.row_scaled``.
        sidecar: flat ``u`` and ``v``, int8, and ``gain``, float32, in the plan's order; None for
            none.

    Returns:
        float32 [N, K].
    """
    levels = code_values(unpack_codes_of(packed, spec.codebook), spec.codebook)
    groups = levels.view(spec.n, -1, spec.group_size) * scale.float().unsqueeze(-1)
    weight = groups.view(spec.n, spec.k)
    if spec.plan is not None and sidecar is not None:
        _add_sidecar(weight, spec.plan, *sidecar)
    return weight


def _add_sidecar(
    weight: torch.Tensor, plan: SidecarPlan, u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor
) -> None:
    parts = zip(plan.slots, plan.u_slots(u), plan.v_slots(v), plan.gain_slots(gain), strict=True)
    for slot, slot_u, slot_v, slot_gain in parts:
        tiles = plan.bundles[slot.bundle].column_tiles(slot_v.float())
        for b, (columns, tile_v) in enumerate(tiles):
            weight[slot.rows, columns] += (slot_u[:, b].float() * slot_gain[b]) @ tile_v
