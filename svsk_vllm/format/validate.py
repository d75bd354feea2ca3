# SPDX-License-Identifier: Apache-2.0
"""Structural and numerical checks of a checkpoint: every problem, not only the first."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from svsk_vllm.format.architectures import serving_problems
from svsk_vllm.format.checkpoint import Checkpoint, parse_quantization_config, split_suffix
from svsk_vllm.format.config import LINEAR_CLASS
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import MAX_INDEX_BYTES
from svsk_vllm.format.fingerprint import fingerprint_problems
from svsk_vllm.format.group_scales import ONE_LEVEL
from svsk_vllm.format.quantized_linear import read_scales, tensor_problems
from svsk_vllm.format.seal import scheme_problems
from svsk_vllm.format.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    ShardedReader,
    read_json,
    read_weight_map,
)
from svsk_vllm.format.spec import (
    SIDECAR_GAIN,
    SUFFIXES,
    WEIGHT_PACKED,
    WEIGHT_ROW_SCALE,
    WEIGHT_SCALE,
    LinearSpec,
    TensorSpec,
)
from svsk_vllm.format.values import finite_problems, weight_problems

__all__ = ["Architecture", "validate_checkpoint"]

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
    tied: Mapping[str, str] = field(default_factory=dict)
    floating: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    targets: Targets = _own_names


def validate_checkpoint(
    folder: Path | str, architecture: Architecture | None = None, *, serving: bool = True
) -> list[str]:
    """Check a checkpoint folder.

    Args:
        folder: the checkpoint.
        architecture: the unquantised model. With it, missing and foreign tensors of the whole model
            are found too, not only those of quantised linears, and linears that the config
            quantises and the folder holds unquantised.
        serving: ask also whether vLLM can serve it, which is no damage to the folder.

    Returns:
        One line per problem, naming the file or tensor, what was found and what was expected.
            Empty: none was found.
    """
    folder = Path(folder)
    problems: list[str] = []
    try:
        parse_quantization_config(folder, read_json(folder / "config.json"))
    except SvskFormatError as error:
        problems.append(str(error))
    try:
        shard_problems, unreadable = _shard_problems(folder)
    except SvskFormatError as error:
        return [*problems, str(error)]
    if problems:  # without a config no linear can be checked
        return problems + shard_problems
    checkpoint = Checkpoint(folder)
    problems += shard_problems
    problems += fingerprint_problems(checkpoint)
    problems += _linear_problems(checkpoint, unreadable)
    problems += _dense_problems(checkpoint, unreadable)
    problems += _target_problems(checkpoint)
    if serving:
        problems += serving_problems(checkpoint)
    if not problems:
        problems += scheme_problems(checkpoint)
    if architecture is not None:
        problems += _architecture_problems(checkpoint, architecture, unreadable)
    return problems


def _shard_problems(folder: Path) -> tuple[list[str], set[str]]:
    """Index against shards: what is damaged, absent or not listed; and what is unreadable."""
    index_path = folder / INDEX_NAME
    shards_there = {path.name for path in folder.glob("*.safetensors")}
    if not index_path.exists():
        ShardedReader(folder)  # raises when the single file is missing or damaged
        return [
            f"{folder / shard}: beside {SINGLE_NAME} and in no index; remove it."
            for shard in sorted(shards_there - {SINGLE_NAME})
        ], set()
    weight_map = read_weight_map(index_path)
    problems: list[str] = []
    unreadable: set[str] = set()
    total = 0
    for shard in sorted(set(weight_map.values()) | shards_there):
        path = folder / shard
        listed = {name for name, file in weight_map.items() if file == shard}
        try:
            held = set(ShardedReader(folder, shards=[shard]).names)
        except SvskFormatError as error:
            problems.append(f"{error} The index lists {len(listed)} tensors in it.")
            unreadable |= listed
            continue
        total += path.stat().st_size
        problems += [
            f"{index_path}: lists {name} in {shard}, which does not hold it."
            for name in sorted(listed - held)
        ]
        problems += [
            f"{path}: holds {name}, which the index does not list there."
            for name in sorted(held - listed)
        ]
        unreadable |= listed - held
    metadata = read_json(index_path, MAX_INDEX_BYTES).get("metadata")
    if not isinstance(metadata, dict):  # transformers reads it
        return [
            *problems,
            f'{index_path}: no "metadata" object. Copy or write the file again.',
        ], unreadable
    declared = metadata.get("total_size")
    if not problems and isinstance(declared, int) and declared > total:
        problems.append(
            f"{index_path}: metadata.total_size {declared} exceeds the {total} bytes of the shards."
        )
    return problems, unreadable


def _linear_problems(checkpoint: Checkpoint, unreadable: set[str]) -> list[str]:
    """Every quantised linear that can be read: scheme, presence, dtype, shape, finite values."""
    problems = []
    stored = _stored_suffixes(checkpoint)
    for module, suffixes in stored.items():
        if f"{module}.weight" in checkpoint.tensors:
            problems.append(f"{module}: stored both dense (.weight) and quantised; remove one.")
        if any(f"{module}.{suffix}" in unreadable for suffix in suffixes):
            continue  # reported with its shard
        if WEIGHT_PACKED not in suffixes:
            problems.append(
                f"{module}.{WEIGHT_PACKED}: missing, but {', '.join(sorted(suffixes))} is there."
            )
            continue
        try:
            problems += _one_linear(checkpoint, checkpoint.linear_spec(module), suffixes)
        except SvskFormatError as error:
            problems.append(str(error))
    if not stored:
        problems.append(
            f"{checkpoint.folder}: no quantised linear,"
            " although config.json declares quant_method svsk."
        )
    return problems


def _one_linear(checkpoint: Checkpoint, spec: LinearSpec, suffixes: set[str]) -> list[str]:
    tensors: dict[str, torch.Tensor | TensorSpec] = {
        s: checkpoint.tensors.describe(f"{spec.name}.{s}") for s in SUFFIXES if s in suffixes
    }
    problems = tensor_problems(spec, tensors)
    model_dtype = checkpoint.model_dtype
    # A scale of any other dtype than the specification's is in the list already.
    one_level = spec.scheme.weights.scale_bits == ONE_LEVEL
    floating = WEIGHT_SCALE if one_level else WEIGHT_ROW_SCALE
    stored = tensors[floating].dtype if floating in tensors else None
    if model_dtype is not None and stored == spec.scale_dtype != model_dtype:
        problems.append(
            f"{spec.name}.{floating}: {stored}, expected the model's dtype {model_dtype}."
        )
    if problems:
        values = [
            f"{spec.name}.{suffix}" for suffix in (floating, SIDECAR_GAIN) if suffix in tensors
        ]
        return problems + [
            p for name in values for p in finite_problems(name, checkpoint.tensors.read(name))
        ]
    parts = (WEIGHT_SCALE,) if one_level else (WEIGHT_SCALE, WEIGHT_ROW_SCALE)
    try:
        scale = read_scales(spec, {s: checkpoint.tensors.read(f"{spec.name}.{s}") for s in parts})
    except SvskFormatError as error:
        return [str(error)]
    gain = checkpoint.tensors.read(f"{spec.name}.{SIDECAR_GAIN}") if spec.rank else None
    return weight_problems(
        spec, scale, gain, spec.scale_dtype, lambda: checkpoint.read_linear(spec.name)
    )


def _stored_suffixes(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Suffixes that are stored for each quantised module."""
    stored: dict[str, set[str]] = {}
    for name in checkpoint.tensors.names:
        parts = split_suffix(name)
        if parts:
            stored.setdefault(parts[0], set()).add(parts[1])
    return stored


def _dense_problems(checkpoint: Checkpoint, unreadable: set[str]) -> list[str]:
    problems = []
    for name in checkpoint.dense_names:
        if name in unreadable:
            continue
        try:
            problems += finite_problems(name, checkpoint.read_dense(name), checkpoint.model_dtype)
        except SvskFormatError as error:
            problems.append(str(error))
    return problems


def _target_problems(checkpoint: Checkpoint) -> list[str]:
    """Modules that a config group names one by one must be stored quantised."""
    modules = _stored_suffixes(checkpoint)
    return [
        f"config.json: {key} names {target}, which is not stored quantised."
        for key, group in checkpoint.config.config_groups.items()
        for target in group.targets
        if target != LINEAR_CLASS and not target.startswith("re:") and target not in modules
    ]


def _architecture_problems(
    checkpoint: Checkpoint, model: Architecture, unreadable: set[str]
) -> list[str]:
    problems = []
    dense, modules = checkpoint.dense_names, sorted(_stored_suffixes(checkpoint))
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
    return problems + _tie_problems(
        checkpoint, model, {found[0]: name for name, (found, _) in targets.items()}
    )


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
        names = [
            stored[name]
            for name in (first, other)
            if name in stored and stored[name] in checkpoint.tensors
        ]
        if len(names) < 2:
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
    """A stored tensor against the architecture's shape; packed codes count eight columns a word."""
    if name in unreadable:
        return []
    try:
        stored = checkpoint.tensors.describe(name).shape
    except SvskFormatError as error:
        return [str(error)]
    if name.endswith(f".{WEIGHT_PACKED}"):
        stored = (*stored[:-1], stored[-1] * 8) if stored else stored
    if stored == tuple(shape):
        return []
    return [f"{name}: holds {list(stored)}, the architecture expects {list(shape)}."]
