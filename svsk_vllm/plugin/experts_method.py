# SPDX-License-Identifier: Apache-2.0
"""Serving quantised experts: what vLLM asks of a method for a mixture's routed experts.

vLLM keeps the experts of a layer in stacked parameters, gate and up as ``w13``, down as ``w2``, and
loads the tensors of one expert after another into them. Here each expert is two layers for the
kernels that serve linears, and ``torch.ops.svsk.experts`` runs them. On CPUs only: the stacks of
vLLM's kernels for GPUs have no sidecar, and nothing of that kind was tried.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe import routed_experts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from svsk_kernels.experts_op import ExpertsKernel, register_experts
from svsk_kernels.layer_kernel import LayerKernel, LayerSpec, replace_parameters
from svsk_vllm.format import ConfigGroup, SvskFormatError
from svsk_vllm.format.group_scales import ONE_LEVEL
from svsk_vllm.format.suffixes import WEIGHT_PACKED, WEIGHT_ROW_SCALE, WEIGHT_SCALE
from svsk_vllm.plugin.arrival import LinearRecord, expect
from svsk_vllm.plugin.kernel_choice import choose_kernel
from svsk_vllm.plugin.linear_method import check_finite
from svsk_vllm.plugin.sidecar_layout import SidecarLayout, build_layout
from svsk_vllm.plugin.sidecar_loader import (
    SIDECAR_DTYPES,
    Arrived,
    StoredBase,
    base_loader,
    base_names,
    clear_padding,
    tile_loader,
)

__all__ = ["Projection", "SvskExpertsMethod", "experts_obstacle"]

_SHARDS: Final = ("w1", "w3", "w2")
"""vLLM's names of gate, up and down."""
_ELSEWHERE: Final = (
    "Serve the dense model that `svsk restore` writes, or quantise with --ignore 're:.*experts.*'."
)
_ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Projection:
    """One of the matrices that every expert of a layer has.

    Attributes:
        shard: vLLM's name of it.
        names: in the checkpoint, by the expert's number over all ranks.
        scheme: of all experts.
    """

    shard: str
    names: tuple[str, ...]
    scheme: ConfigGroup


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


class _Half:
    """Gate and up, or down, of every expert here: parameters, their loaders, the kernel.

    Args:
        stem: of the parameters' names, ``w13`` or ``w2``.
        prefix: the layer's name.
        parts: the projections that are multiplied as one.
        rows: of each part, here.
        columns: here, and in the checkpoint.
        first: the first row (of ``w13``) or column (of ``w2``) of the checkpoint that is here.
        dtype: of activations.
    """

    def __init__(
        self,
        stem: Literal["w13", "w2"],
        prefix: str,
        parts: list[Projection],
        rows: int,
        columns: tuple[int, int],
        first: int,
        dtype: torch.dtype,
    ) -> None:
        self.stem, self.prefix, self.parts, self.rows = stem, prefix, parts, rows
        self.k, self.stored_k = columns
        self.by_rows, self.first, self.dtype = stem == "w13", first, dtype
        self.weights = parts[0].scheme.weights
        group = self.weights.group_size
        if self.k % group:
            smaller = next((size for size in (32, 16) if size < group and not self.k % size), None)
            hint = f", or quantise with --group-size {smaller}" if smaller else ""
            raise SvskFormatError(
                f"{prefix}: each rank gets {self.k} of {self.stored_k} features of every expert,"
                f" not a multiple of the group size {group}. Lower tensor_parallel_size, add"
                f" --enable-expert-parallel{hint}."
            )
        self.n = rows * len(parts)
        self.layout = self._layout()
        plan = self.layout.plan if self.layout else None
        sidecars = [part.scheme.sidecar for part in parts if part.scheme.sidecar.rank]
        bits: Literal[4, 8] = 4 if all(side.num_bits == 4 for side in sidecars) else 8
        self.spec = LayerSpec(
            self.n,
            self.k,
            group,
            self.weights.joined_codebook,
            dtype,
            plan,
            bits,
            self.weights.scale_bits != ONE_LEVEL,
        )
        self.names: tuple[str, ...] = ()  # of what the kernel reads, once prepared

    def _layout(self) -> SidecarLayout | None:
        numbers = torch.arange(self.rows, device="cpu")

        def rows(shard: Any) -> torch.Tensor:
            found = torch.full((self.n,), -1, device="cpu")
            place = [part.shard for part in self.parts].index(shard) * self.rows
            found[place : place + self.rows] = numbers + (self.first if self.by_rows else 0)
            return found

        start = 0 if self.by_rows else self.first
        return build_layout(
            self.prefix,
            [(part.shard, part.scheme) for part in self.parts],
            rows,
            lambda _: torch.arange(start, start + self.k, device="cpu"),
            self.stored_k,
            self.n,
        )

    def register(self, layer: Any, arrived: Mapping[int, Arrived]) -> None:
        """Register what is loaded, stacked over the experts that are here.

        Args:
            layer: vLLM's.
            arrived: counts, by the expert's place here.
        """
        groups = self.k // self.weights.group_size
        scale = torch.int8 if self.spec.row_scaled else self.dtype
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            WEIGHT_PACKED: ((self.n, self.k // self.weights.codes_per_word), torch.int32),
            WEIGHT_SCALE: ((self.n, groups), scale),
        }
        if self.spec.row_scaled:
            shapes[WEIGHT_ROW_SCALE] = ((self.n, 1), self.dtype)
        tensors = {
            name: torch.empty(len(arrived), *shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
        if self.layout:
            for name, flat in zip(SIDECAR_DTYPES, self.layout.plan.zeros(), strict=True):
                tensors[name] = flat.repeat(len(arrived), 1)
        for name, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = self._loader(layer, name, arrived)  # type: ignore[attr-defined]
            layer.register_parameter(f"{self.stem}_{name}", parameter)

    def _loader(self, layer: Any, name: str, arrived: Mapping[int, Arrived]) -> Callable[..., bool]:
        place_of = layer._map_global_expert_id_to_local_expert_id
        loaders = {place: self._one_loader(name, counts) for place, counts in arrived.items()}

        def load(
            param: torch.Tensor,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            place = place_of(expert_id)
            if place < 0:
                return False
            loaders[place](param.data[place], loaded_weight, shard_id)
            return True

        return load

    def _one_loader(self, name: str, arrived: Arrived) -> Callable[..., None]:
        """Loads a tensor of one expert into its part of the stack."""
        if name in SIDECAR_DTYPES:
            assert self.layout is not None, "only a sidecar has these parameters"
            return tile_loader(self.prefix, name, self.layout, self.stored_k, arrived)
        return base_loader(
            self.prefix,
            name,
            self._copy,
            arrived,
            None,
            StoredBase(self.weights, self.stored_k // self.weights.group_size),
            keep=True,
            whole=True,
        )

    def _copy(self, param: torch.Tensor, values: torch.Tensor, shard: str) -> None:
        """This rank's part of a stored tensor of the base, into its rows of one expert."""
        place = [part.shard for part in self.parts].index(shard) * self.rows
        own = param[place : place + self.rows]
        if self.by_rows:
            own.copy_(values[self.first : self.first + self.rows])
        elif values.shape[1] == 1 and own.shape[1] == 1:  # of rows
            own.copy_(values)
        else:
            columns, per = own.shape[1], self.k // own.shape[1]
            own.copy_(values[:, self.first // per : self.first // per + columns])

    def prepare(self, layer: Any, kernel: LayerKernel, *, counted: bool) -> None:
        """Turn the loaded stacks into those that the kernel reads.

        Raises:
            SvskFormatError: scales or gains are not finite.
        """
        loaded = {
            name: getattr(layer, f"{self.stem}_{name}").data
            for name in (*base_names(self.weights), *(SIDECAR_DTYPES if self.layout else ()))
        }
        prepared: list[dict[str, torch.Tensor]] = []
        for place in range(len(loaded[WEIGHT_PACKED])):
            one: Any = torch.nn.Module()
            replace_parameters(one, {name: stack[place] for name, stack in loaded.items()})
            if counted:
                check_finite(f"{self.prefix}.{self.parts[0].names[place]}", one)
            if self.layout:
                clear_padding(one.sidecar_v.data, self.layout.plan)
            kernel.prepare(one)
            prepared.append({name: tensor.data for name, tensor in one.named_parameters()})
        for name in loaded:
            delattr(layer, f"{self.stem}_{name}")
        self.names = tuple(prepared[0])
        stacks = {f"{self.stem}_{n}": torch.stack([one[n] for one in prepared]) for n in self.names}
        replace_parameters(layer, stacks)

    def tensors(self, layer: Any) -> list[torch.Tensor]:
        """What the kernel reads."""
        return [getattr(layer, f"{self.stem}_{name}") for name in self.names]


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
        self.gate_up = _Half(
            "w13", self.prefix, names[:2], inner, (hidden_size, hidden_size), first, params_dtype
        )
        self.down = _Half(
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
