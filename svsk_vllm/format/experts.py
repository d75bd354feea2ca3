# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture: linears of many, which engines multiply in one launch.

A checkpoint stores every matrix of every expert as a linear of its own
(``model.layers.0.mlp.experts.3.gate_proj``). What runs them keeps those of one layer and projection
in one tensor, so they have one scheme, and gate and up, which are multiplied as one, one base.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from svsk_vllm.format.config import ConfigGroup

__all__ = [
    "ExpertName",
    "expert_layers",
    "expert_problems",
    "projection_pattern",
    "same_scheme",
]

_NAME: Final = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_GATE_UP: Final = frozenset({"gate_proj", "up_proj", "w1", "w3"})


@dataclass(frozen=True)
class ExpertName:
    """The name of an expert's linear, in parts.

    Attributes:
        layer: name of all experts of the layer.
        number: of the expert.
        projection: which of its matrices.
    """

    layer: str
    number: int
    projection: str

    @classmethod
    def of(cls, name: str) -> "ExpertName | None":
        """The parts of a linear's name; None where it is no expert's."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(found[1], int(found[2]), found[3])

    @property
    def base(self) -> tuple[str, str]:
        """Layer and what of it is multiplied as one: linears of equal value have one base."""
        return self.layer, "gate_up" if self.projection in _GATE_UP else self.projection


def expert_layers(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Linears of experts by layer and projection, in their order; all others are left out."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if expert := ExpertName.of(name):
            layers.setdefault((expert.layer, expert.projection), []).append(name)
    return layers


def projection_pattern(layer: str, projection: str) -> str:
    """The target of a config group that means one matrix of every expert of a layer."""
    return rf"re:{re.escape(layer)}\.\d+\.{re.escape(projection)}$"


def same_scheme(left: ConfigGroup | None, right: ConfigGroup | None) -> bool:
    """Whether two schemes store a linear alike, whatever else they are for."""
    if left is None or right is None:
        return left is right
    return (left.weights, left.sidecar) == (right.weights, right.sidecar)


def expert_problems(schemes: Mapping[str, ConfigGroup | None]) -> list[str]:
    """What about the schemes of a model's experts is not served, one line each.

    Args:
        schemes: by full name, of all linears; None for one that is not quantised.
    """
    problems = []
    chosen: dict[str, dict[str, ConfigGroup | None]] = {}  # by layer and projection
    for (layer, projection), names in expert_layers(schemes).items():
        first = names[0]
        other = next((n for n in names if not same_scheme(schemes[n], schemes[first])), None)
        if other is not None:
            problems.append(
                f"{first} and {other}: experts of one layer are served as one tensor, but the"
                f" schemes of their {projection} differ. Give all experts of a layer the same, or"
                " put all of them on the ignore list."
            )
        chosen.setdefault(layer, {})[projection] = schemes[names[0]]
    if problems:
        return problems
    for layer, parts in chosen.items():
        left = [projection for projection, scheme in parts.items() if scheme is None]
        if left and len(left) < len(parts):
            problems.append(
                f"{layer}: {', '.join(left)} of its experts is not quantised, the rest is. They"
                " are served together: quantise all matrices of a layer's experts or none."
            )
        bases = {scheme.weights for p, scheme in parts.items() if scheme and p in _GATE_UP}
        if len(bases) > 1:
            problems.append(
                f"{layer}: gate and up of its experts are multiplied as one, but their bases"
                " differ. Give them one group size, one codebook and one scale_bits."
            )
    return problems
