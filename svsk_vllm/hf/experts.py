# SPDX-License-Identifier: Apache-2.0
"""Quantised experts in transformers: dequantised one by one, and then stacked as it stacks them.

transformers' converter of a stack of experts takes the dense matrices of all experts. It is given
one operation more, which comes first and makes these of the stored tensors, and the names of the
stored tensors.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter

from svsk_vllm.architecture.parameter_names import ParameterName
from svsk_vllm.format import (
    SUFFIXES,
    Checkpoint,
    LinearSpec,
    QuantizedLinear,
    restored_weight,
)
from svsk_vllm.format.experts import ExpertName, same_scheme
from svsk_vllm.format.suffixes import WEIGHT_PACKED

__all__ = ["DequantizeExperts", "Stacks", "expert_converters", "match_experts"]

_WEIGHT: Final = ".weight"

Stacks = dict[str, dict[str, list[LinearSpec]]]
"""By the name of a stacked parameter, and by the pattern of the dense weights that it is made of:
the experts' linears in the order of their numbers."""


class DequantizeExperts(ConversionOps):
    """From the stored tensors of a layer's experts to their weights.

    Args:
        own: transformers' converter, whose operations come after this one.
        stacks: what is stored of each stack, filled before anything is loaded.
        made: is told of parameters that were made.
    """

    def __init__(self, own: WeightConverter, stacks: Stacks, made: set[str]) -> None:
        self.own, self._stacks, self._made = own, stacks, made

    def __deepcopy__(self, memo: dict[int, Any]) -> "DequantizeExperts":
        # transformers copies the converter for every parameter; all of them share this state.
        return self

    def converter(self) -> WeightConverter:
        """The converter that takes the place of transformers' own."""
        sources = [
            f"{pattern.removesuffix(_WEIGHT)}.{suffix}$"
            for pattern in self.own.source_patterns
            for suffix in ("weight", *SUFFIXES)
        ]
        return WeightConverter(
            sources, list(self.own.target_patterns), [self, *self.own.operations]
        )

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Called by transformers with the tensors of all experts of a layer by source pattern.

        ``W_hat`` is computed on the CPU whatever the device, so that it does not depend on it.
        """
        specs = self._stacks.get(full_layer_name, {})
        weights: dict[str, list[torch.Tensor]] = {}
        for pattern in self.own.source_patterns:
            stem = pattern.removesuffix(_WEIGHT)
            found = {
                suffix: input_dict.pop(key)
                for suffix in ("weight", *SUFFIXES)
                if (key := f"{stem}.{suffix}$") in input_dict
            }
            dense = f"{stem}{_WEIGHT}$"  # one of the converter's patterns, as what follows needs
            if pattern not in specs:
                weights[dense] = found["weight"]
                continue
            weights[dense] = []
            for number, spec in enumerate(specs[pattern]):
                tensors = {suffix: tensor[number] for suffix, tensor in found.items()}
                stored = {f"{spec.name}.{suffix}": t.cpu() for suffix, t in tensors.items()}
                weight = restored_weight(QuantizedLinear.from_tensors(spec, stored))
                weights[dense].append(weight.to(tensors[WEIGHT_PACKED].device))
        self._made.update({full_layer_name} & self._stacks.keys())
        return weights


def expert_converters(conversions: Iterable[Any], stacks: Stacks, made: set[str]) -> list[Any]:
    """transformers' conversions for a model, those of stacks of experts replaced.

    Args:
        conversions: transformers'.
        stacks: what is stored, filled before anything is loaded.
        made: is told of parameters that were made.
    """
    return [
        DequantizeExperts(entry, stacks, made).converter() if _is_of_experts(entry) else entry
        for entry in conversions
    ]


def _is_of_experts(entry: Any) -> bool:
    return (
        isinstance(entry, WeightConverter)
        and isinstance(entry.operations[0], MergeModulelist)
        and all(p.endswith(_WEIGHT) and "experts" in p for p in entry.source_patterns)
    )


def match_experts(
    checkpoint: Checkpoint,
    names: Mapping[str, ParameterName],
    parameters: Mapping[str, torch.Tensor],
) -> tuple[Stacks, list[str]]:
    """What of a checkpoint's experts goes into which stack, and what is wrong with it.

    Args:
        checkpoint: a sound one.
        names: of parameters, by stored name.
        parameters: of the model.
    """
    ending = f"{_WEIGHT[1:]}_packed$"
    stacks: Stacks = {}
    for module, spec in checkpoint.linears.items():
        place = names[f"{module}.{WEIGHT_PACKED}"]
        if ExpertName.of(module) and place.pattern and place.targets[0] in parameters:
            pattern = place.pattern.removesuffix(ending) + _WEIGHT[1:]
            stacks.setdefault(place.targets[0], {}).setdefault(pattern, []).append(spec)
    problems = []
    for target, patterns in stacks.items():
        shape = tuple(parameters[target].shape)
        for specs in patterns.values():
            specs.sort(key=_number)
            first = specs[0]
            if [_number(spec) for spec in specs] != list(range(shape[0])):
                problems.append(
                    f"{target}: holds {shape[0]} experts, the checkpoint has {len(specs)} of"
                    f" {first.name} and its like"
                )
            if not all(same_scheme(spec.scheme, first.scheme) for spec in specs):
                problems.append(f"{target}: the schemes of its experts differ")
        rows = sum(specs[0].n for specs in patterns.values())
        if any((rows, specs[0].k) != shape[1:] for specs in patterns.values()):
            stored = [[specs[0].n, specs[0].k] for specs in patterns.values()]
            problems.append(f"{target}: {list(shape)}, its experts are stored as {stored}")
    return stacks, problems


def _number(spec: LinearSpec) -> int:
    name = ExpertName.of(spec.name)
    assert name is not None, "only experts' linears are matched"
    return name.number
