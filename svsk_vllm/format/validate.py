# SPDX-License-Identifier: Apache-2.0
"""Structural and numerical checks of a checkpoint: every problem, not only the first."""

from pathlib import Path

import torch

from svsk_vllm.format.architecture_fit import Architecture, architecture_problems
from svsk_vllm.format.architectures import serving_problems
from svsk_vllm.format.checkpoint import (
    Checkpoint,
    parse_quantization_config,
    stored_suffixes,
)
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
from svsk_vllm.format.spec import LinearSpec, TensorSpec
from svsk_vllm.format.suffixes import (
    SCALE_SUFFIXES,
    SIDECAR_GAIN,
    SUFFIXES,
    WEIGHT_HOT_SCALE,
    WEIGHT_PACKED,
    WEIGHT_ROW_SCALE,
    WEIGHT_SCALE,
)
from svsk_vllm.format.targets import LINEAR_CLASS
from svsk_vllm.format.values import finite_problems, weight_problems

__all__ = ["validate_checkpoint"]


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
        problems += architecture_problems(checkpoint, architecture, unreadable)
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
    stored = stored_suffixes(checkpoint)
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
    # Of what is computed from several tensors a message could not say which one is to blame.
    apart = (floating, WEIGHT_HOT_SCALE, SIDECAR_GAIN) if problems else (WEIGHT_HOT_SCALE,)
    problems += [
        problem
        for suffix in apart
        if suffix in tensors
        for problem in finite_problems(
            f"{spec.name}.{suffix}", checkpoint.tensors.read(f"{spec.name}.{suffix}")
        )
    ]
    if problems:
        return problems
    parts = [s for s in SCALE_SUFFIXES if s in tensors]
    try:
        scale = read_scales(spec, {s: checkpoint.tensors.read(f"{spec.name}.{s}") for s in parts})
    except SvskFormatError as error:
        return [str(error)]
    gain = checkpoint.tensors.read(f"{spec.name}.{SIDECAR_GAIN}") if spec.rank else None
    return weight_problems(
        spec, scale, gain, spec.scale_dtype, lambda: checkpoint.read_linear(spec.name)
    )


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
    """Modules that the config names one by one must be stored quantised."""
    modules = stored_suffixes(checkpoint)
    table = checkpoint.config.embedding
    problems = []
    if table is not None and table.module not in modules:
        problems.append(
            f"config.json: embedding names {table.module}, which is not stored quantised."
        )
    return problems + [
        f"config.json: {key} names {target}, which is not stored quantised."
        for key, group in checkpoint.config.config_groups.items()
        for target in group.targets
        if target != LINEAR_CLASS and not target.startswith("re:") and target not in modules
    ]
