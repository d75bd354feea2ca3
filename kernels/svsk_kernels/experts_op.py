# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer as one custom op, ``torch.ops.svsk.experts``.

Which expert runs on which tokens is known only when it runs, so a compiled graph sees one op. It
gathers each expert's tokens and multiplies by the kernels of whole layers: gate and up as one
layer, the activation, and down.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch

from svsk_kernels.layer_kernel import LayerKernel, LayerSpec

__all__ = ["ExpertsKernel", "register_experts"]


@dataclass(frozen=True)
class ExpertsKernel:
    """How the experts of a layer are run; all have one shape and one scheme.

    Attributes:
        gate_up: runs [gate | up] of one expert.
        down: runs its down.
        names: of the parameters that each of the two reads of a prepared layer.
        activation: from [M, 2 I], gate and up, to [M, I].
    """

    gate_up: LayerKernel
    down: LayerKernel
    names: tuple[tuple[str, ...], tuple[str, ...]]
    activation: Callable[[torch.Tensor], torch.Tensor]


_known: Final[dict[str, ExpertsKernel]] = {}


def register_experts(kernel: ExpertsKernel, specs: tuple[LayerSpec, LayerSpec], detail: str) -> str:
    """Make the op know a kernel.

    Args:
        kernel: it.
        specs: of an expert's two layers.
        detail: all that it depends on besides them.

    Returns:
        A key of what it computes: the same for the same, in any process, so that a compiled graph
        may hold it.
    """
    parts = (*specs, *kernel.names, type(kernel.gate_up), type(kernel.down), detail)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    _known[key] = kernel
    return key


def _experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    gate_up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    key: str,
) -> torch.Tensor:
    """The experts' outputs, weighted and summed in float32.

    Args:
        x: [M, K].
        topk_weights: float [M, k], the weights of each row's experts.
        topk_ids: integers [M, k], which these are, of all experts.
        expert_map: integers [experts], the place here of each, -1 for those that are elsewhere;
            None where all are here.
        gate_up: the prepared parameters of gate and up, each [experts here, ...].
        down: those of down.
        key: of :func:`register_experts`.

    Returns:
        [M, K] of the dtype of ``x``.
    """
    kernel: Any = _known[key]
    places = topk_ids.long()
    if expert_map is not None:
        places = expert_map.long()[places]
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in places.unique().tolist():
        if expert < 0:
            continue
        rows, chosen = torch.where(places == expert)
        first, second = (
            SimpleNamespace(**{n: t[expert] for n, t in zip(names, tensors, strict=True)})
            for names, tensors in zip(kernel.names, (gate_up, down), strict=True)
        )
        middle = kernel.activation(kernel.gate_up(first, x[rows], None))
        weight = topk_weights[rows, chosen].float().unsqueeze(1)
        result.index_add_(0, rows, kernel.down(second, middle, None).float() * weight)
    return result.to(x.dtype)


def _experts_fake(x: torch.Tensor, *args: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_library = torch.library.Library("svsk", "FRAGMENT")
_library.define(
    "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor[] gate_up,"
    " Tensor[] down, str key) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("svsk::experts", _experts_fake, lib=_library)
