# SPDX-License-Identifier: Apache-2.0
"""Serving quantised experts: what vLLM asks of a method for a mixture's routed experts.

vLLM keeps the experts of a layer in stacked parameters, gate and up as ``w13``, down as ``w2``, and
loads the tensors of one expert after another into them. Here each expert is two layers for the
kernels that serve linears, and ``torch.ops.svsk.experts`` runs them. On CPUs only: the stacks of
vLLM's kernels for GPUs have no sidecar, and nothing of that kind was tried.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe import routed_experts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from svsk_kernels.experts_op import ExpertsKernel, register_experts
from svsk_vllm.format import SvskFormatError
from svsk_vllm.plugin.arrival import LinearRecord, expect
from svsk_vllm.plugin.experts_stack import ExpertsHalf, Projection
from svsk_vllm.plugin.kernel_choice import choose_kernel
from svsk_vllm.plugin.sidecar_loader import Arrived

__all__ = ["SvskExpertsMethod", "experts_obstacle"]

_ELSEWHERE: Final = (
    "Serve the dense model that `svsk restore` writes, or quantise with --ignore 're:.*experts.*'."
)
_ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def experts_obstacle(layer: Any, device: torch.device, *, sidecar: bool) -> str | None:
    """Why a layer's quantised experts cannot be served, and the remedy; None if they can.

    Args:
        layer: vLLM's module of the layer's routed experts.
        device: where it runs.
        sidecar: whether an expert has one.
    """
    moe = layer.moe_config
    if device.type != "cpu":
        return (
            f"quantised experts are served on CPUs only so far, not on {device.type}. {_ELSEWHERE}"
        )
    if sidecar and not hasattr(routed_experts, "_index_expert_mapping"):
        return (
            "this version of vLLM takes a tensor of three dimensions, as a sidecar's, for the stack"
            " of all experts and would load it in pieces. Use vLLM 0.32 or a later one, or"
            " quantise with --rank 0."
        )
    named = getattr(moe.activation, "value", moe.activation)
    reasons = {
        f"their activation is {named}": named not in _ACTIVATIONS,
        "they have biases": moe.has_bias,
        "their activation is clamped": getattr(moe, "swiglu_limit", None) is not None,
        "weights of the router multiply their input": getattr(
            layer, "apply_router_weight_on_input", False
        ),
        "LoRA adapters are enabled": moe.is_lora_enabled,
        "vLLM runs shared experts among them": bool(
            getattr(layer.expert_map_manager, "num_fused_shared_experts", 0)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            return f"{reason}, which is not served quantised. {_ELSEWHERE}"
    return None


class SvskExpertsMethod(FusedMoEMethodBase):
    """Method of the routed experts of one layer.

    Args:
        prefix: the layer's name in the vLLM model.
        layer: vLLM's module of them.
        parts: gate, up and down.
        counted: whether parameters have to be loaded at all: not where vLLM makes weights up.
    """

    def __init__(
        self,
        prefix: str,
        layer: Any,
        parts: tuple[Projection, Projection, Projection],
        counted: bool,
    ) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.parts, self.counted = prefix, parts, counted

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """No kernel of vLLM's is used."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the layer's parameters and choose its kernels.

        Raises:
            SvskFormatError: a rank's part does not fit the groups, or no kernel takes an expert.
        """
        gate = self.parts[0]
        inner = intermediate_size_per_partition
        whole, first = inner * self.moe.tp_size, inner * self.moe.tp_rank
        here = sorted(
            (place, number)
            for number in range(len(gate.names))
            if (place := layer._map_global_expert_id_to_local_expert_id(number)) >= 0
        )
        self.arrived = {
            place: Arrived(
                {part.shard: part.names[number] for part in self.parts},
                [part.scheme for part in self.parts],
            )
            for place, number in here
        }
        if len(here) != num_experts:
            raise SvskFormatError(
                f"{self.prefix}: vLLM holds {num_experts} experts here, of which the checkpoint has"
                f" {len(here)}: copies of experts (EPLB) are not served."
            )
        names = [
            Projection(p.shard, tuple(p.names[number] for _, number in here), p.scheme)
            for p in self.parts
        ]
        self.gate_up = ExpertsHalf(
            "w13", self.prefix, names[:2], inner, (hidden_size, hidden_size), first, params_dtype
        )
        self.down = ExpertsHalf(
            "w2", self.prefix, names[2:], hidden_size, (inner, whole), first, params_dtype
        )
        for half in (self.gate_up, self.down):
            half.register(layer, self.arrived)
        device = layer.w2_weight_packed.device
        shapes = ((2 * whole, hidden_size), (hidden_size, whole))
        self.kernels = [
            choose_kernel(self.prefix, half.spec, shape, device, split=False)
            for half, shape in zip((self.gate_up, self.down), shapes, strict=True)
        ]
        own = frozenset(name for name, _ in layer.named_parameters(recurse=False))
        expect(layer, LinearRecord((None,), own, self.counted))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn the loaded parameters into those of the kernels.

        Raises:
            SvskFormatError: something was not loaded, or scales or gains are not finite.
        """
        if self.counted:
            for arrived in self.arrived.values():
                arrived.check(self.prefix)
        halves = (self.gate_up, self.down)
        for half, kernel in zip(halves, self.kernels, strict=True):
            half.prepare(layer, kernel, counted=self.counted)
        named = str(getattr(self.moe.activation, "value", self.moe.activation))
        experts = ExpertsKernel(
            self.kernels[0],
            self.kernels[1],
            (self.gate_up.names, self.down.names),
            partial(_gated, _ACTIVATIONS[named]),
        )
        labels = [getattr(kernel, "label", "") for kernel in self.kernels]
        specs = (self.gate_up.spec, self.down.spec)
        self.key = register_experts(experts, specs, " ".join([named, *labels]))

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The routed experts' weighted sum; this rank's part of it.

        Args:
            layer: the layer.
            x: [tokens, hidden].
            topk_weights: float [tokens, k].
            topk_ids: integers [tokens, k].
            shared_experts: run by vLLM.
            shared_experts_input: likewise.

        Returns:
            [tokens, hidden] of the dtype of ``x``.
        """
        y: torch.Tensor = torch.ops.svsk.experts(
            x,
            topk_weights,
            topk_ids,
            layer.expert_map,
            self.gate_up.tensors(layer),
            self.down.tensors(layer),
            self.key,
        )
        return y


def _gated(
    activation: Callable[[torch.Tensor], torch.Tensor], gate_up: torch.Tensor
) -> torch.Tensor:
    """``activation(gate) * up`` in float32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (activation(gate) * up).to(gate_up.dtype)
