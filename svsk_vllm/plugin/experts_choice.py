# SPDX-License-Identifier: Apache-2.0
"""Which of the checkpoint's modules the routed experts of a layer of vLLM's model are."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from svsk_vllm.format import ConfigGroup, LinearSpec, SvskFormatError
from svsk_vllm.format.experts import expert_problems
from svsk_vllm.plugin.experts_method import SvskExpertsMethod, experts_obstacle
from svsk_vllm.plugin.experts_stack import Projection
from svsk_vllm.plugin.stored_names import other_size

__all__ = ["experts_method"]


def experts_method(
    config: Any, layer: Any, prefix: str, *, counted: bool
) -> QuantizeMethodBase | None:
    """The method of a layer's routed experts; None where they are not quantised.

    Args:
        config: this package's, of the model.
        layer: vLLM's module of the experts.
        prefix: its name in vLLM's model.
        counted: whether parameters have to be loaded at all.

    Raises:
        SvskFormatError: the experts have several schemes, are of another size than the layer's, or
            cannot be served.
    """
    projections = {
        "w1": getattr(layer, "ckpt_gate_proj_name", "gate_proj"),
        "w3": getattr(layer, "ckpt_up_proj_name", "up_proj"),
        "w2": getattr(layer, "ckpt_down_proj_name", "down_proj"),
    }
    names = {
        shard: [f"{prefix}.{number}.{name}" for number in range(layer.global_num_experts)]
        for shard, name in projections.items()
    }
    schemes: dict[str, ConfigGroup | None] = {}  # by stored name
    stored: dict[str, list[str]] = {shard: [] for shard in names}
    for shard, members in names.items():
        for name in members:
            own = config.stored_name(name)
            stored[shard].append(own)
            schemes[own] = config.scheme(name)
    if problems := expert_problems(schemes):
        raise SvskFormatError(problems[0])
    parts = [
        Projection(shard, tuple(members), scheme)
        for shard, members in stored.items()
        if (scheme := schemes[members[0]]) is not None
    ]
    if len(parts) < len(stored):
        return None
    gate, up, down = parts
    sidecar = any(part.scheme.sidecar.rank for part in parts)
    if obstacle := experts_obstacle(layer, torch.empty(0).device, sidecar=sidecar):
        raise SvskFormatError(f"{gate.names[0]} and the other experts of {prefix}: {obstacle}")
    hidden, inner = layer.moe_config.hidden_dim, layer.moe_config.intermediate_size
    for part in parts:
        specs = config.stored_specs(part.names, [part.scheme] * len(part.names))
        _check_sizes(specs or (), (hidden, inner) if part is down else (inner, hidden))
    return SvskExpertsMethod(prefix, layer, (gate, up, down), counted)


def _check_sizes(specs: tuple[LinearSpec, ...], want: tuple[int, int]) -> None:
    for spec in specs:
        if (spec.n, spec.k) != want:
            raise other_size(spec, *want)
