# SPDX-License-Identifier: Apache-2.0
"""Structural and numerical checks of a checkpoint: every problem, not only the first."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from svsk_vllm.format.checkpoint import Checkpoint, parse_quantization_config, split_suffix
from svsk_vllm.format.config import LINEAR_CLASS
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.linear import tensor_problems
from svsk_vllm.format.shards import INDEX_NAME, SINGLE_NAME, ShardedReader, read_json, read_weight_map
from svsk_vllm.format.spec import SIDECAR_GAIN, SUFFIXES, WEIGHT_PACKED, WEIGHT_SCALE, LinearSpec

__all__ = ["validate_checkpoint"]

_FLOATS_TO_CHECK = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def validate_checkpoint(
    folder: Path | str, dense_shapes: Mapping[str, tuple[int, ...]] | None = None, linears: Iterable[str] = ()
) -> list[str]:
    """Check a checkpoint folder.

    Args:
        folder: the checkpoint.
        dense_shapes: names and shapes of the parameters of the unquantised architecture, tied ones once. With it,
            missing and foreign tensors of the whole model are found too, not only those of quantised linears.
        linears: names of the linear modules of that architecture. With them, linears are found that the config
            quantises and the folder holds unquantised.

    Returns:
        One line per problem, naming the file or tensor, what was found and what was expected. Empty: none was found.
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
    problems += _linear_problems(checkpoint, unreadable)
    problems += _dense_problems(checkpoint, unreadable)
    problems += _target_problems(checkpoint)
    if dense_shapes is not None:
        problems += _architecture_problems(checkpoint, dense_shapes, unreadable)
    dense = set(checkpoint.dense_names)
    problems += [
        f"{name}.weight: stored as it was, but config.json quantises {name}. Add it to the ignore list, or quantise it."
        for name in linears
        if f"{name}.weight" in dense and checkpoint.config.scheme_for(name) is not None
    ]
    return problems


def _shard_problems(folder: Path) -> tuple[list[str], set[str]]:
    """Index against shards: damaged files, tensors listed but absent, and the reverse; and what cannot be read."""
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
            with safe_open(path, framework="pt", device="cpu") as handle:
                held = set(handle.keys())
        except (OSError, SafetensorError) as error:
            problems.append(f"{path}: cannot be opened ({error}); the index lists {len(listed)} tensors in it.")
            unreadable |= listed
            continue
        total += path.stat().st_size
        problems += [
            f"{index_path}: lists {name} in {shard}, which does not hold it." for name in sorted(listed - held)
        ]
        problems += [f"{path}: holds {name}, which the index does not list there." for name in sorted(held - listed)]
        unreadable |= listed - held
    metadata = read_json(index_path).get("metadata")
    declared = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not problems and isinstance(declared, int) and declared > total:
        problems.append(f"{index_path}: metadata.total_size {declared} exceeds the {total} bytes of the shards.")
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
            problems.append(f"{module}.{WEIGHT_PACKED}: missing, but {', '.join(sorted(suffixes))} is there.")
            continue
        try:
            problems += _one_linear(checkpoint, checkpoint.linear_spec(module), suffixes)
        except SvskFormatError as error:
            problems.append(str(error))
    if not stored:
        problems.append(f"{checkpoint.folder}: no quantised linear, although config.json declares quant_method svsk.")
    return problems


def _one_linear(checkpoint: Checkpoint, spec: LinearSpec, suffixes: set[str]) -> list[str]:
    tensors: dict[str, torch.Tensor] = {
        s: checkpoint.tensors.read(f"{spec.name}.{s}") for s in SUFFIXES if s in suffixes
    }
    problems = tensor_problems(spec, tensors)
    scale, model_dtype = tensors.get(WEIGHT_SCALE), checkpoint.model_dtype
    # A scale of any other dtype than the specification's is in the list already.
    if model_dtype is not None and scale is not None and scale.dtype == spec.scale_dtype != model_dtype:
        problems.append(f"{spec.name}.{WEIGHT_SCALE}: {scale.dtype}, expected the model's dtype {model_dtype}.")
    for suffix in (WEIGHT_SCALE, SIDECAR_GAIN):
        if suffix in tensors:
            problems += _finite_problems(f"{spec.name}.{suffix}", tensors[suffix])
    return problems


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
            problems += _finite_problems(name, checkpoint.read_dense(name))
        except SvskFormatError as error:
            problems.append(str(error))
    return problems


def _finite_problems(name: str, tensor: torch.Tensor) -> list[str]:
    if tensor.dtype not in _FLOATS_TO_CHECK:
        return []
    # torch.isfinite lacks float8; a float64 must not be narrowed, 1e300 is finite
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    bad = int((~torch.isfinite(wide)).sum())
    return [f"{name}: {bad} of {tensor.numel()} values are not finite."] if bad else []


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
    checkpoint: Checkpoint, dense_shapes: Mapping[str, tuple[int, ...]], unreadable: set[str]
) -> list[str]:
    problems = []
    modules = _stored_suffixes(checkpoint)
    for name, shape in dense_shapes.items():
        module = name.removesuffix(".weight")
        packed = f"{module}.{WEIGHT_PACKED}"
        if name in checkpoint.tensors:
            problems += _shape_problems(checkpoint, name, shape, unreadable)
        elif name.endswith(".weight") and module in modules:
            if packed in checkpoint.tensors:  # its absence is reported with the linear
                problems += _shape_problems(checkpoint, packed, shape, unreadable)
        else:
            problems.append(f"{name}: missing, the architecture expects it with shape {list(shape)}.")
    problems += [
        f"{name}: the architecture has no such parameter."
        for name in checkpoint.dense_names
        if name not in dense_shapes
    ]
    problems += [
        f"{module}: stored quantised, but the architecture has no {module}.weight."
        for module in sorted(modules)
        if f"{module}.weight" not in dense_shapes
    ]
    return problems


def _shape_problems(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], unreadable: set[str]) -> list[str]:
    """A stored tensor against the architecture's shape; packed codes count eight columns a word."""
    if name in unreadable:
        return []
    try:
        found = checkpoint.tensors.describe(name).shape
    except SvskFormatError as error:
        return [str(error)]
    if name.endswith(f".{WEIGHT_PACKED}"):
        found = (*found[:-1], found[-1] * 8) if found else found
    if found == tuple(shape):
        return []
    return [f"{name}: holds {list(found)}, the architecture expects {list(shape)}."]
