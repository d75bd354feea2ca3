# SPDX-License-Identifier: Apache-2.0
"""What vLLM makes of an architecture, known without vLLM.

Which linears it fuses, and so must be quantised alike, and whose embedding and output head must
stay dense.

``architectures.json`` says so for the version of vLLM it was made from
(``.ci/vllm_architectures.py`` makes it).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from svsk_vllm.format.checkpoint import Checkpoint, split_suffix
from svsk_vllm.format.config import ConfigGroup
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.experts import expert_problems
from svsk_vllm.format.row_order import row_order_problem

__all__ = ["VllmClass", "serving_problems", "vllm_class"]

_USUAL = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class VllmClass:
    """A model class by its name in config.json, as vLLM sees it.

    Attributes:
        name: of the class; empty when config.json names none.
        support: ``native``: vLLM has a class of its own. ``transformers``: it serves transformers'
            class through its backend for them. ``removed``: it had a class once. ``unknown``: it
            has none; its backend for transformers' classes may do.
        fused: sets of two or more linears that become one layer in vLLM, by the ends of their
            names.
        vllm: the version of vLLM that this was read from.
        last: of a removed class, the last version of vLLM that had it.
        dense_tables: whether its code reads the weight of embedding or output head, which are not
            there when they are quantised.
    """

    name: str
    support: Literal["native", "transformers", "removed", "unknown"]
    fused: tuple[tuple[str, ...], ...]
    vllm: str
    last: str = ""
    dense_tables: bool = False

    def fused_sets(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Which of some linears become one layer in vLLM.

        Args:
            names: full names of the linears of a model.

        Returns:
            Sets of two or more names, each set and the list in the order of ``names``. No name is
            in two sets.
        """
        names = list(names)
        sets: dict[tuple[str, ...], set[str]] = {}
        for parts in self.fused:
            for name in names:
                for part in parts:
                    if f".{name}".endswith(f".{part}"):
                        sets.setdefault((name.removesuffix(part), *parts), set()).add(name)
        joined: list[set[str]] = []
        for members in sets.values():
            if len(members) > 1:
                touching = [other for other in joined if other & members]
                joined = [other for other in joined if not other & members]
                joined.append(members.union(*touching))
        order = {name: index for index, name in enumerate(names)}
        ordered = [tuple(sorted(members, key=order.__getitem__)) for members in joined]
        return sorted(ordered, key=lambda members: order[members[0]])

    def fused_problems(self, schemes: Mapping[str, ConfigGroup | None]) -> list[str]:
        """What about the schemes of a model's linears vLLM would refuse, one line each.

        Args:
            schemes: by full name, of all linears; None for one that is not quantised.
        """
        problems = []
        for members in self.fused_sets(schemes):
            chosen = {name: scheme for name in members if (scheme := schemes[name]) is not None}
            left = [name for name in members if name not in chosen]
            if chosen and left:
                problems.append(
                    f"{', '.join(members)}: vLLM fuses them into one layer ({self.name}), but"
                    f" {_listed(left)} not quantised while {_listed(list(chosen))}. Put all of them"
                    " on the ignore list, or none."
                )
            bases = {scheme.weights for scheme in chosen.values()}
            if len(bases) > 1:
                described = ", ".join(
                    f"{name}: {base.codebook} g{base.group_size} with {base.scale_bits}-bit scales"
                    for name, base in ((name, scheme.weights) for name, scheme in chosen.items())
                )
                problems.append(
                    f"{', '.join(chosen)}: vLLM fuses them into one layer ({self.name}), but their"
                    f" bases differ ({described}). Give them one group size, one codebook and"
                    " one scale_bits; ranks and tiles may differ."
                )
        return problems

    def note(self) -> str | None:
        """What to know before relying on vLLM for this model, in one line; None: nothing."""
        if self.support == "removed":
            return (
                f"{self.name}: vLLM {self.last} was the last to"
                " serve it. transformers can use the checkpoint."
            )
        if self.support == "unknown":
            return (
                f"{self.name or 'config.json names no architecture'}: vLLM"
                f" {self.vllm} has no class for it. It may serve it through"
                " its backend for transformers' classes, or not at all."
            )
        return None


def vllm_class(hf_config: Mapping[str, Any], default: str = "") -> VllmClass:
    """What vLLM makes of a model.

    Args:
        hf_config: config.json.
        default: name of the model's class, for a config.json that names none.
    """
    named = hf_config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    name = (names or [default])[0]
    table = _table()
    entry = table["classes"].get(name)
    if entry is not None:
        fused = tuple(tuple(parts) for parts in entry["fused"].values() if len(parts) > 1)
        return VllmClass(
            name,
            "transformers" if entry.get("transformers") else "native",
            fused,
            table["vllm"],
            dense_tables=entry.get("dense_tables", False),
        )
    last = table["removed"].get(name, "")
    return VllmClass(name, "removed" if last else "unknown", _USUAL, table["vllm"], last)


def serving_problems(checkpoint: Checkpoint) -> list[str]:
    """What vLLM would refuse, or serve wrong, of this class with these schemes, a line each."""
    schemes: dict[str, ConfigGroup | None] = {}
    for module in dict.fromkeys(
        parts[0] for name in checkpoint.tensors.names if (parts := split_suffix(name))
    ):
        try:
            scheme = checkpoint.config.scheme_for(module)
        except SvskFormatError:  # reported with the linear, as is the lack of a scheme
            continue
        if scheme is not None:
            schemes[module] = scheme
    served = vllm_class(checkpoint.hf_config)
    rows = (
        row_order_problem([served.name], name, group.sidecar.rank)
        for name, group in schemes.items()
        if group
    )
    problems = [problem for problem in rows if problem]
    embedding = checkpoint.config.embedding
    if served.dense_tables and embedding is not None:
        problems.append(
            f"{embedding.module}: quantised, but vLLM {served.vllm} reads its dense weight in"
            f" {served.name}. Quantise with --head dense --embedding dense."
        )
    for name in checkpoint.dense_names:
        if name.endswith(".weight"):
            schemes.setdefault(name.removesuffix(".weight"), None)
    return problems + served.fused_problems(schemes) + expert_problems(schemes)


@cache
def _table() -> dict[str, Any]:
    """``architectures.json``, its groups by the name of the class."""
    text = files("svsk_vllm.format").joinpath("architectures.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    table["classes"] = {
        name: group for group in table.pop("groups") for name in group["architectures"]
    }
    return table


def _listed(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
