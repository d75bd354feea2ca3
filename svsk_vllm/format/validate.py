# SPDX-License-Identifier: Apache-2.0
"""Structural and numerical checks of a checkpoint: every problem, not only the first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from svsk_vllm.format.checkpoint import Checkpoint, parse_quantization_config, split_suffix
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.linear import tensor_problems
from svsk_vllm.format.shards import INDEX_NAME, ShardedReader, read_json
from svsk_vllm.format.spec import SIDECAR_GAIN, SUFFIXES, WEIGHT_PACKED, WEIGHT_SCALE, LinearSpec

__all__ = ["validate_checkpoint"]


def validate_checkpoint(folder: Path | str, dense_shapes: Mapping[str, tuple[int, ...]] | None = None) -> list[str]:
    """Check a checkpoint folder.

    Args:
        folder: the checkpoint.
        dense_shapes: names and shapes of the parameters of the unquantised architecture, tied ones once. With it,
            missing and foreign tensors of the whole model are found too, not only those of quantised linears.

    Returns:
        One line per problem, naming the file or tensor, what was found and what was expected. Empty: none was found.
    """
    folder = Path(folder)
    try:
        hf_config = read_json(folder / "config.json")
        parse_quantization_config(folder, hf_config)
        problems = _shard_problems(folder)
        if problems:  # contents cannot be trusted, and reading them would raise
            return problems
        checkpoint = Checkpoint(folder)
    except SvskFormatError as error:
        return [str(error)]
    problems += _linear_problems(checkpoint, _model_dtype(hf_config))
    problems += _dense_problems(checkpoint)
    problems += _target_problems(checkpoint)
    if dense_shapes is not None:
        problems += _architecture_problems(checkpoint, dense_shapes)
    return problems


def _shard_problems(folder: Path) -> list[str]:
    """Index against shards: files that are missing or damaged, tensors listed but absent, and the reverse."""
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        ShardedReader(folder)  # raises when the single file is missing or damaged
        return []
    index = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        return [f'{index_path}: no "weight_map" object.']
    problems, total = [], 0
    for shard in sorted(set(weight_map.values()) | {path.name for path in folder.glob("*.safetensors")}):
        path = folder / shard
        listed = {name for name, file in weight_map.items() if file == shard}
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                held = set(handle.keys())
        except (OSError, SafetensorError) as error:
            problems.append(f"{path}: cannot be opened ({error}); the index lists {len(listed)} tensors in it.")
            continue
        total += path.stat().st_size
        problems += [
            f"{index_path}: lists {name} in {shard}, which does not hold it." for name in sorted(listed - held)
        ]
        problems += [f"{path}: holds {name}, which the index does not list there." for name in sorted(held - listed)]
    declared = index.get("metadata", {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
    if not problems and isinstance(declared, int) and declared > total:
        problems.append(f"{index_path}: metadata.total_size {declared} exceeds the {total} bytes of the shards.")
    return problems


def _linear_problems(checkpoint: Checkpoint, model_dtype: torch.dtype | None) -> list[str]:
    """Every quantised linear: scheme, presence, dtype, shape, finite values."""
    problems = []
    stored: dict[str, set[str]] = {}
    for name in checkpoint.tensors.names:
        parts = split_suffix(name)
        if parts:
            stored.setdefault(parts[0], set()).add(parts[1])
    for module, suffixes in stored.items():
        if f"{module}.weight" in checkpoint.tensors:
            problems.append(f"{module}: stored both dense (.weight) and quantised; remove one.")
        if WEIGHT_PACKED not in suffixes:
            problems.append(f"{module}.{WEIGHT_PACKED}: missing, but {', '.join(sorted(suffixes))} is there.")
            continue
        try:
            spec = checkpoint.linear_spec(module)
        except SvskFormatError as error:
            problems.append(str(error))
            continue
        problems += _one_linear(checkpoint, spec, suffixes, model_dtype)
    if not stored:
        problems.append(f"{checkpoint.folder}: no quantised linear, although config.json declares quant_method svsk.")
    return problems


def _one_linear(
    checkpoint: Checkpoint, spec: LinearSpec, suffixes: set[str], model_dtype: torch.dtype | None
) -> list[str]:
    tensors = {s: checkpoint.tensors.read(f"{spec.name}.{s}") for s in SUFFIXES if s in suffixes}
    problems = tensor_problems(spec, tensors)
    scale = tensors.get(WEIGHT_SCALE)
    if model_dtype is not None and scale is not None and scale.dtype != model_dtype:
        problems.append(f"{spec.name}.{WEIGHT_SCALE}: {scale.dtype}, expected the model's dtype {model_dtype}.")
    for suffix in (WEIGHT_SCALE, SIDECAR_GAIN):
        problems += _finite_problems(f"{spec.name}.{suffix}", tensors.get(suffix))
    return problems


def _dense_problems(checkpoint: Checkpoint) -> list[str]:
    return [
        problem for name in checkpoint.dense_names for problem in _finite_problems(name, checkpoint.read_dense(name))
    ]


def _finite_problems(name: str, tensor: torch.Tensor | None) -> list[str]:
    if tensor is None or not tensor.is_floating_point():
        return []
    bad = int((~torch.isfinite(tensor.float())).sum())
    return [f"{name}: {bad} of {tensor.numel()} values are not finite."] if bad else []


def _target_problems(checkpoint: Checkpoint) -> list[str]:
    """Modules that a config group names one by one must be stored quantised."""
    modules = {parts[0] for name in checkpoint.tensors.names if (parts := split_suffix(name))}
    return [
        f"config.json: {key} names {target}, which is not stored quantised."
        for key, group in checkpoint.config.config_groups.items()
        for target in group.targets
        if "." in target and not target.startswith("re:") and target not in modules
    ]


def _architecture_problems(checkpoint: Checkpoint, dense_shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    modules = {parts[0] for name in checkpoint.tensors.names if (parts := split_suffix(name))}
    for name, shape in dense_shapes.items():
        module = name.removesuffix(".weight")
        if name in checkpoint.tensors:
            found = checkpoint.tensors.describe(name).shape
            if found != tuple(shape):
                problems.append(f"{name}: shape {list(found)}, the architecture expects {list(shape)}.")
        elif name.endswith(".weight") and module in modules:
            packed = f"{module}.{WEIGHT_PACKED}"
            if packed in checkpoint.tensors:
                n, words = checkpoint.tensors.describe(packed).shape
                if (n, words * 8) != tuple(shape):
                    problems.append(f"{packed}: holds [{n}, {words * 8}], the architecture expects {list(shape)}.")
        else:
            problems.append(f"{name}: missing, the architecture expects it with shape {list(shape)}.")
    known = set(dense_shapes)
    problems += [
        f"{name}: the architecture has no such parameter." for name in checkpoint.dense_names if name not in known
    ]
    problems += [
        f"{module}: stored quantised, but the architecture has no {module}.weight."
        for module in sorted(modules)
        if f"{module}.weight" not in known
    ]
    return problems


def _model_dtype(hf_config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype config.json declares, None when it declares none."""
    name = hf_config.get("dtype") or hf_config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None
