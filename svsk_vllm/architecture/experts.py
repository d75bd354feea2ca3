# SPDX-License-Identifier: Apache-2.0
"""Experts that transformers keeps in one stack, as linears of their own again.

Folders store the matrices of a mixture of experts one by one (``mlp.experts.3.gate_proj.weight``),
and so do all 4-bit checkpoints that vLLM loads. transformers 5 stacks them while it loads, to
multiply them in one launch. Whoever quantises or checks matrices needs them apart, under the names
they are stored by: transformers' own converters tell these names.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

__all__ = ["SeparateExperts", "separate_experts"]

_STACKS = {"gate_up_proj", "down_proj"}
"""Parameters of transformers' classes for gated experts."""


class _Expert(nn.Module):
    """One expert: three linears without bias, by the names they are stored by.

    Args:
        names: of gate, up and down.
        hidden: features of the model.
        intermediate: features between.
    """

    def __init__(self, names: tuple[str, str, str], hidden: int, intermediate: int) -> None:
        super().__init__()
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(up, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(down, nn.Linear(intermediate, hidden, bias=False))


class SeparateExperts(nn.Module):
    """The experts of a layer as modules ``0``, ``1``, ... in place of transformers' stack.

    Args:
        stack: transformers' module; its parameters are dropped, its activation is used.
        names: of gate, up and down in the folder.
    """

    def __init__(self, stack: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.count, width, hidden = stack.gate_up_proj.shape
        self._names = names
        with torch.device("meta"):
            for number in range(self.count):
                self.add_module(str(number), _Expert(names, hidden, width // 2))
        for name in _STACKS:
            delattr(stack, name)
        self._apply_gate = stack._apply_gate
        self._tokens: torch.Tensor | None = None

    @property
    def routed(self) -> torch.Tensor:
        """While an expert runs: which of the layer's tokens it was given, int64 [rows]."""
        assert self._tokens is not None, "no expert is running"
        return self._tokens

    def parts(self) -> list[tuple[str, list[str]]]:
        """By projection, gate, up and down in turn, the names of its linears below this module."""
        return [(name, [f"{n}.{name}" for n in range(self.count)]) for name in self._names]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' outputs, weighted and summed.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: integers [tokens, k], the experts of each token.
            top_k_weights: [tokens, k], their weights.

        Returns:
            [tokens, hidden] of the dtype of ``hidden_states``.
        """
        result = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number >= self.count:
                continue  # transformers' mark of experts that are elsewhere
            tokens, place = torch.where(top_k_index == number)
            self._tokens = tokens
            gate, up, down = (self.get_submodule(f"{number}.{name}") for name in self._names)
            rows = hidden_states[tokens]
            middle = self._apply_gate(torch.cat((gate(rows), up(rows)), dim=-1))
            weighted = down(middle) * top_k_weights[tokens, place, None]
            result.index_add_(0, tokens, weighted.to(result.dtype))
        self._tokens = None
        return result


def separate_experts(model: Any, stored: Iterable[str]) -> list[str]:
    """Replace a model's stacks of experts whose matrices are stored one by one.

    Args:
        model: a transformers model, its stacks on the meta device.
        stored: names of the stored tensors, as they were or quantised.

    Returns:
        Names of the modules that were replaced: none where the folder holds stacks too, or the
        class of the experts is none of gate, up and down without bias.
    """
    converters = [
        entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)
    ]
    stored, replaced = list(stored), []
    found: dict[tuple[str, ...], bool] = {}
    for name, module in list(model.named_modules()):
        if not _is_gated_stack(module):
            continue
        names = _stored_names(name, converters)
        if names is None:
            continue
        if names not in found:
            expert = re.compile(rf"\.\d+\.{re.escape(names[0])}\.weight(_packed)?$")
            found[names] = any(map(expert.search, stored))
        if found[names]:
            model.set_submodule(name, SeparateExperts(module, names))
            replaced.append(name)
    return replaced


def _is_gated_stack(module: Any) -> bool:
    """Whether a module is transformers' usual stack: rows [gate | up] and down, nothing else."""
    own = {name for name, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
    return (
        own == _STACKS
        and module.gate_up_proj.ndim == 3
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "is_transposed", True)
        and getattr(module, "is_concatenated", False)
    )


def _stored_names(
    module: str, converters: Iterable[WeightConverter]
) -> tuple[str, str, str] | None:
    """What the folder calls gate, up and down of an expert; None if it does not store them so."""
    names: dict[str, list[str]] = {}
    for entry in converters:
        target = entry.target_patterns[0].replace("\\", "")
        stack = target.rpartition(".")[2]
        if stack not in _STACKS or not f".{module}.{stack}".endswith(f".{target.lstrip('.')}"):
            continue
        merged = isinstance(entry.operations[0], MergeModulelist)
        joined = [isinstance(operation, Concatenate) for operation in entry.operations[1:]]
        if merged and joined == ([True] if stack == "gate_up_proj" else []):
            names[stack] = [
                pattern.removesuffix(".weight").rpartition("*.")[2]
                for pattern in entry.source_patterns
            ]
    if names.keys() != _STACKS or [len(names[key]) for key in ("gate_up_proj", "down_proj")] != [
        2,
        1,
    ]:
        return None
    (gate, up), (down,) = names["gate_up_proj"], names["down_proj"]
    return gate, up, down
