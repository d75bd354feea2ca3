# SPDX-License-Identifier: Apache-2.0
"""Which parameter is filled from which stored tensor, by transformers' own loading rules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["ParameterName", "parameter_names"]


@dataclass(frozen=True)
class ParameterName:
    """Where transformers puts a stored tensor.

    Attributes:
        targets: names of the parameters it fills; more than one when the model's class splits it.
        pattern: source pattern of the weight converter that takes it, None when it is only renamed.
    """

    targets: tuple[str, ...]
    pattern: str | None


def parameter_names(model: Any, quantizer: Any, stored: Iterable[str]) -> dict[str, ParameterName]:
    """Parameters of ``model`` by the stored name transformers fills them from, by its own rules.

    Args:
        model: the transformers model, on the meta device.
        quantizer: the quantiser that loads it, for its weight converter.
        stored: names of the tensors of the checkpoint.
    """
    mapping = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    targets_of = {
        pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns
    }
    parameters, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        # Without converters: what they would join may have been taken apart (experts.py).
        for rules in (renamings, []):
            if target not in parameters:
                plain, _ = rename_source_key(name, rules, [], prefix, parameters)
                if plain in parameters:
                    target, pattern = plain, None
        first, *others = targets_of[pattern] if pattern is not None else [target]
        targets = (target, *(target.replace(first, other) for other in others))
        names[name] = ParameterName(targets, pattern)
    return names
