# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint against the parameters of the unquantised model they must fill."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from svsk_vllm.format.checkpoint import Checkpoint, stored_suffixes
from svsk_vllm.format.config import ConfigGroup, WeightArgs
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.suffixes import WEIGHT_PACKED

__all__ = ["Architecture", "architecture_problems"]

Targets = Callable[[list[str]], Mapping[str, tuple[tuple[str, ...], bool]]]


def _own_names(names: list[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
    return {name: ((name,), True) for name in names}


@dataclass(frozen=True)
class Architecture:
    """The unquantised model that a checkpoint must fill.

    Attributes:
        required: shape by name of every parameter, tied ones once.
        optional: shape by name of what may be stored as well: other ends of ties, buffers.
        linears: names of the linear modules. One that the config quantises must not be stored as it
            was.
        tables: names of the embedding modules, of which one may be stored quantised.
        tied: parameter by the name of the parameter tied to it, for values stored twice.
        floating: names of what holds floating numbers, which integers stored in their place would
            be taken for.
        ignored: patterns of names that the model's class does not want although they are stored.
        targets: which parameters each stored name fills, and whether as it is: models rename and
            fuse what is stored.
    """

    required: Mapping[str, tuple[int, ...]]
    optional: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    linears: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    floating: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    targets: Targets = _own_names


def architecture_problems(
    checkpoint: Checkpoint, model: Architecture, unreadable: set[str]
) -> list[str]:
    """What of a model a folder lacks, and what it holds besides, one line each.

    Args:
        checkpoint: the folder.
        model: the model.
        unreadable: tensors of damaged shards, which are reported already.
    """
    problems = []
    dense, modules = checkpoint.dense_names, sorted(stored_suffixes(checkpoint))
    targets = model.targets([*dense, *(f"{module}.weight" for module in modules)])
    filled = {target for found, _ in targets.values() for target in found}
    problems += [
        f"{name}: missing, the architecture expects it with shape {list(shape)}."
        for name, shape in model.required.items()
        if name not in filled
    ]
    shapes = {**model.optional, **model.required}
    for name in dense:
        found, as_it_is = targets[name]
        if found[0] not in shapes:
            if not any(re.search(pattern, name) for pattern in model.ignored):
                problems.append(f"{name}: the architecture has no such parameter.")
        elif as_it_is:
            problems += _shape_problems(checkpoint, name, shapes[found[0]], unreadable)
            problems += _dense_linear_problems(checkpoint, model, name, found[0])
        if found[0] in model.floating and name not in unreadable:
            problems += _integer_problems(checkpoint, name)
    for module in modules:
        found, as_it_is = targets[f"{module}.weight"]
        packed = f"{module}.{WEIGHT_PACKED}"
        if found[0] not in shapes:
            problems.append(
                f"{module}: stored quantised, but the architecture has no {module}.weight."
            )
        elif as_it_is and packed in checkpoint.tensors:  # its absence is reported with the linear
            problems += _shape_problems(checkpoint, packed, shapes[found[0]], unreadable)
        problems += _table_problems(checkpoint, model, module, found[0])
    return problems + _tie_problems(
        checkpoint, model, {found[0]: name for name, (found, _) in targets.items()}
    )


def _table_problems(
    checkpoint: Checkpoint, model: Architecture, module: str, target: str
) -> list[str]:
    """A quantised table the config does not call one, or not as the architecture uses it."""
    declared = checkpoint.config.embedding
    is_table = target.removesuffix(".weight") in model.tables
    if not checkpoint.config.is_embedding(module):
        return (
            [
                f"{module}: stored quantised, but it is an embedding: config.json has to name it"
                ' under "embedding".'
            ]
            if is_table
            else []
        )
    if not is_table:
        return [f"config.json: embedding names {module}, which is no embedding of the model."]
    tied = target in {*model.tied.keys(), *model.tied.values()}
    assert declared is not None, "is_embedding says so"
    if declared.tied != tied:
        return [
            f"config.json: embedding.tied is {declared.tied}, but the model"
            f" {'uses' if tied else 'does not use'} {module} as its output head. Put back the"
            " config.json that was written with the weights."
        ]
    return []


def _integer_problems(checkpoint: Checkpoint, name: str) -> list[str]:
    try:
        dtype = checkpoint.tensors.describe(name).dtype
    except SvskFormatError:
        return []  # reported where it is read
    return (
        []
        if dtype.is_floating_point
        else [f"{name}: {dtype}, the architecture expects floating numbers."]
    )


def _dense_linear_problems(
    checkpoint: Checkpoint, model: Architecture, name: str, target: str
) -> list[str]:
    """A linear stored as it was although the config quantises it; no tied head is."""
    module = name.removesuffix(".weight")
    if target.removesuffix(".weight") not in model.linears or not name.endswith(".weight"):
        return []
    if target in model.tied or checkpoint.config.scheme_for(module) is None:
        return []
    return [
        f"{name}: stored as it was, but config.json quantises"
        f" {module}. Add it to the ignore list, or quantise it."
    ]


def _tie_problems(
    checkpoint: Checkpoint, model: Architecture, stored: Mapping[str, str]
) -> list[str]:
    """Both ends of a tie stored with different values: a loader would drop one of them."""
    problems = []
    for other, first in model.tied.items():
        names = [stored[name] for name in (first, other) if name in stored]
        if len(names) < 2:
            continue
        if quantised := [name for name in names if name not in checkpoint.tensors]:
            problems.append(
                f"{quantised[0].removesuffix('.weight')}: stored quantised, and"
                f" {names[names[0] == quantised[0]]}, to which config.json ties it, is stored too."
                " Remove one, or the tie."
            )
            continue
        try:
            values = [checkpoint.read_dense(name) for name in names]
        except SvskFormatError:
            continue  # reported with its shard
        if not torch.equal(*values):
            problems.append(
                f"{names[1]}: differs from {names[0]}, to which"
                " config.json ties it. Remove one, or the tie."
            )
    return problems


def _shape_problems(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], unreadable: set[str]
) -> list[str]:
    """A stored tensor against the architecture's shape; packed codes count as columns."""
    if name in unreadable:
        return []
    try:
        stored = checkpoint.tensors.describe(name).shape
    except SvskFormatError as error:
        return [str(error)]
    if name.endswith(f".{WEIGHT_PACKED}"):
        scheme = _scheme(checkpoint, name.removesuffix(f".{WEIGHT_PACKED}"))
        # Without a scheme the linear is reported as such; its shape is as of a usual one.
        weights = scheme.weights if scheme else WeightArgs()
        stored = weights.shape_of(stored) if len(stored) == 2 else stored
    if stored == tuple(shape):
        return []
    return [f"{name}: holds {list(stored)}, the architecture expects {list(shape)}."]


def _scheme(checkpoint: Checkpoint, module: str) -> ConfigGroup | None:
    """The scheme of a stored module; None without one, which is reported with the linear."""
    try:
        return checkpoint.config.scheme_for(module)
    except SvskFormatError:
        return None
