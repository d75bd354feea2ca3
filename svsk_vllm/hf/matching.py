# SPDX-License-Identifier: Apache-2.0
"""What an SVSK checkpoint stores, compared with its config and with the transformers model it is loaded into.

transformers only warns about weights that it leaves at random values, so the loader
(``svsk_vllm.hf``) settles here, from the headers of the files alone, which stored tensors become
which parameter, and refuses what does not add up.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers.core_model_loading import build_glob_alternation

from svsk_vllm.architecture.parameter_names import ParameterName
from svsk_vllm.format import SUFFIXES, LinearSpec, SvskCheckpointConfig, SvskFormatError
from svsk_vllm.format.checkpoint import split_suffix
from svsk_vllm.format.files import open_safetensors
from svsk_vllm.format.quantized_linear import tensor_problems
from svsk_vllm.format.shards import described
from svsk_vllm.format.spec import WEIGHT_PACKED, WEIGHT_SCALE

__all__ = [
    "SUFFIX_OF_PATTERN",
    "USE_RESTORE",
    "listed",
    "match_model",
    "parameter_dtypes",
    "read_headers",
    "stored_linears",
]

SUFFIX_OF_PATTERN: Final = {rf"\.{suffix}$": suffix for suffix in SUFFIXES}
"""Suffix of a stored tensor by the regular expression that finds it in a name."""

USE_RESTORE: Final = (
    "Write a dense folder with `svsk restore` and load that, or serve the checkpoint with vLLM."
)
_MAX_PROBLEMS: Final = 5


def read_headers(files: Iterable[str] | None) -> dict[str, torch.Tensor]:
    """Every stored tensor by name, with its dtype and shape, on the meta device.

    Raises:
        SvskFormatError: the files are not safetensors, or one cannot be opened.
    """
    stored = {}
    for file in files or ():
        if not file.endswith(".safetensors"):
            raise SvskFormatError(f"{file}: an SVSK checkpoint consists of .safetensors files.")
        with open_safetensors(Path(file)) as handle:
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                found = described(Path(file), name, handle.get_slice(name))
                stored[name] = torch.empty(found.shape, dtype=found.dtype, device="meta")
    if not stored:
        raise SvskFormatError(
            "An SVSK checkpoint is loaded from its files: pass a folder or a hub id to"
            " from_pretrained()."
        )
    return stored


def stored_linears(
    config: SvskCheckpointConfig, stored: Mapping[str, torch.Tensor]
) -> dict[str, LinearSpec]:
    """Specification of every quantised linear by its name in the checkpoint, each complete and as the config says.

    Raises:
        SvskFormatError: the stored tensors and the config disagree.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        if parts := split_suffix(name):
            groups.setdefault(parts[0], {})[parts[1]] = tensor
    specs, problems = {}, []
    for module, tensors in groups.items():
        if f"{module}.weight" in stored:
            problems.append(f"{module}: stored both dense (.weight) and quantised; remove one")
        try:
            specs[module] = _linear_spec(config, module, tensors)
            problems += tensor_problems(specs[module], tensors)
        except SvskFormatError as error:
            problems.append(str(error))
    if not groups:
        problems.append(
            "no quantised linear is stored, although config.json declares quant_method svsk"
        )
    _raise_any(problems)
    return specs


def _linear_spec(
    config: SvskCheckpointConfig, module: str, tensors: Mapping[str, torch.Tensor]
) -> LinearSpec:
    scheme = config.scheme_for(module)
    if scheme is None:
        why = "is on the ignore list" if config.is_ignored(module) else "matches no config group"
        raise SvskFormatError(
            f"{module}: stored quantised, but {why} in config.json. Correct the config."
        )
    packed, scale = tensors.get(WEIGHT_PACKED), tensors.get(WEIGHT_SCALE)
    if packed is None or packed.ndim != 2:
        found = "missing" if packed is None else f"shape {list(packed.shape)}, expected a matrix"
        raise SvskFormatError(
            f"{module}.{WEIGHT_PACKED}: {found}, but {', '.join(sorted(tensors))} is stored."
        )
    if scale is None:
        raise SvskFormatError(
            f"{module}.{WEIGHT_SCALE}: missing, but {', '.join(sorted(tensors))} is stored."
        )
    return LinearSpec(module, packed.shape[0], packed.shape[1] * 8, scheme, scale.dtype)


def parameter_dtypes(model: Any) -> dict[str, torch.dtype]:
    """Dtype of every floating parameter and buffer once loaded.

    The model's, or float32 where its class insists.
    """
    requested = model.config.dtype
    keep: set[str] = set()
    if requested == torch.float16:
        keep.update(model._keep_in_fp32_modules or ())
    if requested in (torch.float16, torch.bfloat16):
        keep.update(model._keep_in_fp32_modules_strict or ())
    in_float32 = build_glob_alternation(sorted(keep))[0] if keep else None
    return {
        name: torch.float32 if in_float32 is not None and in_float32.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def match_model(
    model: Any,
    config: SvskCheckpointConfig,
    stored: Mapping[str, torch.Tensor],
    linears: Mapping[str, LinearSpec],
    names: Mapping[str, ParameterName],
) -> dict[str, LinearSpec]:
    """Specification of each quantised linear by the name of its weight in ``model``.

    Raises:
        SvskFormatError: a quantised weight has no ``torch.nn.Linear`` to go to, a tensor has the
            wrong shape, a linear the config targets is stored dense, or is not stored.
    """
    parameters = model.state_dict()
    owners = {name: type(module) for name, module in model.named_modules()}
    tied = _tied(model)
    specs, homeless, problems = {}, [], []
    for module, spec in linears.items():
        target = names[f"{module}.{WEIGHT_PACKED}"].targets[0]
        if target not in parameters:
            homeless.append(module)
        elif not issubclass(owners[_owner(target)], torch.nn.Linear) or target in tied:
            what = (
                "tied to another"
                if target in tied
                else f"part of a {owners[_owner(target)].__name__}"
            )
            problems.append(
                f"{module}: stored quantised, but {target} is {what}, not a plain torch.nn.Linear"
            )
        elif tuple(parameters[target].shape) != (spec.n, spec.k):
            problems.append(
                f"{module}: stored as {[spec.n, spec.k]}, {target} is"
                f" {list(parameters[target].shape)}"
            )
        else:
            specs[target] = spec
    filled = specs.keys() | {
        target for name in stored if not split_suffix(name) for target in names[name].targets
    }
    problems += _unfilled_problems(config, parameters, owners, filled | tied, homeless)
    problems += _dense_problems(config, stored, names, parameters, owners, tied)
    _raise_any(problems)
    return specs


def _unfilled_problems(
    config: SvskCheckpointConfig,
    parameters: Mapping[str, torch.Tensor],
    owners: Mapping[str, type],
    filled: Iterable[str],
    homeless: list[str],
) -> list[str]:
    """Parameters that transformers would leave at random values, where quantised weights are to blame.

    Quantised linears the model has no use for (``homeless``) are no problem by themselves: a model
    without a head does not load the head.
    """
    problems = []
    for name in parameters.keys() - set(filled):
        if homeless and parameters[name].ndim > 2:
            problems.append(
                f"{name}: transformers fuses linears such as {homeless[0]}, which is stored"
                f" quantised, into one parameter of shape {list(parameters[name].shape)}."
                f" {USE_RESTORE}"
            )
        elif (
            issubclass(owners[_owner(name)], torch.nn.Linear)
            and config.scheme_for(_owner(name)) is not None
        ):
            hint = f" {homeless[0]} is stored, but fits no layer: {USE_RESTORE}" if homeless else ""
            problems.append(
                f"{name}: the config targets this linear, but the checkpoint holds it neither"
                " quantised nor dense. The checkpoint is incomplete or of another architecture; a"
                f" layer that only this model class adds belongs on the ignore list.{hint}"
            )
    return problems


def _dense_problems(
    config: SvskCheckpointConfig,
    stored: Mapping[str, torch.Tensor],
    names: Mapping[str, ParameterName],
    parameters: Mapping[str, torch.Tensor],
    owners: Mapping[str, type],
    tied: set[str],
) -> list[str]:
    """Tensors stored as they were.

    Linears the config says are quantised, and shapes that do not fit.

    With a quantiser, transformers itself would take a tensor of any shape.
    """
    problems = []
    for name, tensor in stored.items():
        target, pattern = names[name].targets[0], names[name].pattern
        if split_suffix(name) or pattern is not None or target not in parameters:
            continue
        is_linear = name.endswith(".weight") and issubclass(owners[_owner(target)], torch.nn.Linear)
        if is_linear and target not in tied and config.scheme_for(_owner(name)) is not None:
            problems.append(
                f"{name}: stored dense, but a config group targets it; put it on the ignore list"
            )
        elif tensor.shape != parameters[target].shape:
            problems.append(
                f"{name}: shape {list(tensor.shape)}, the model has"
                f" {list(parameters[target].shape)}"
            )
    return problems


def _tied(model: Any) -> set[str]:
    """Parameters that share their storage with another, both ends."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}


def _owner(name: str) -> str:
    """Name of the module that holds a parameter."""
    return name.rpartition(".")[0]


def listed(items: list[str]) -> str:
    """The first few items and how many more there are, for an error message."""
    more = f"; and {len(items) - _MAX_PROBLEMS} more" if len(items) > _MAX_PROBLEMS else ""
    return "; ".join(items[:_MAX_PROBLEMS]) + more


def _raise_any(problems: list[str]) -> None:
    if problems:
        raise SvskFormatError(listed(sorted(problems)))
