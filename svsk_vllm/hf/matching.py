# SPDX-License-Identifier: Apache-2.0
"""What an SVSK checkpoint stores, compared with the transformers model it is loaded into.

transformers only warns about weights that it leaves at random values, so the loader
(``svsk_vllm.hf``) settles here, from the headers of the files alone, which stored tensors become
which parameter, and refuses what does not add up.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers.core_model_loading import build_glob_alternation

from svsk_vllm.architecture.parameter_names import ParameterName
from svsk_vllm.format import (
    SUFFIXES,
    Checkpoint,
    LinearSpec,
    SvskCheckpointConfig,
    SvskFormatError,
)
from svsk_vllm.format.suffixes import WEIGHT_PACKED
from svsk_vllm.hf.experts import Stacks, match_experts

__all__ = [
    "SUFFIX_OF_PATTERN",
    "USE_RESTORE",
    "listed",
    "match_model",
    "open_checkpoint",
    "parameter_dtypes",
]

SUFFIX_OF_PATTERN: Final = {rf"\.{suffix}$": suffix for suffix in SUFFIXES}
"""Suffix of a stored tensor by the regular expression that finds it in a name."""

USE_RESTORE: Final = (
    "Write a dense folder with `svsk restore` and load that, or serve the checkpoint with vLLM."
)
_MAX_PROBLEMS: Final = 5


def open_checkpoint(files: Sequence[str]) -> Checkpoint:
    """The checkpoint that consists of the files transformers is about to load.

    Raises:
        SvskFormatError: there are none, or others than safetensors.
    """
    for file in files:
        if not file.endswith(".safetensors"):
            raise SvskFormatError(
                f"{file}: an SVSK checkpoint consists of .safetensors files. Leave the other files"
                " out of the folder."
            )
    if not files:
        raise SvskFormatError(
            "An SVSK checkpoint is loaded from its files: pass a folder or a hub id to"
            " from_pretrained()."
        )
    return Checkpoint(Path(files[0]).parent)


def parameter_dtypes(model: Any) -> dict[str, torch.dtype]:
    """Dtype of each floating tensor once loaded: the model's, or float32 by its class."""
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
    model: Any, checkpoint: Checkpoint, names: Mapping[str, ParameterName]
) -> tuple[dict[str, LinearSpec], Stacks]:
    """Specification of each quantised linear by the name of its weight in ``model``, and experts.

    Args:
        model: on the meta device.
        checkpoint: a sound one, see :func:`svsk_vllm.architecture.folder_check.require_sound`.
        names: of parameters, by stored name.

    Raises:
        SvskFormatError: a quantised weight has no ``torch.nn.Linear`` to go to, a table no
            ``torch.nn.Embedding``, a tensor has the wrong shape, a linear the config targets is
            stored dense, or is not stored.
    """
    parameters = model.state_dict()
    owners = {name: type(module) for name, module in model.named_modules()}
    tied = _tied(model)
    specs, homeless = {}, []
    stacks, problems = match_experts(checkpoint, names, parameters)
    for module, spec in checkpoint.linears.items():
        target = names[f"{module}.{WEIGHT_PACKED}"].targets[0]
        if target in stacks:
            continue
        if target not in parameters:
            homeless.append(module)
        elif what := _not_taken(
            owners[_owner(target)],
            is_table=checkpoint.config.is_embedding(module),
            tied=target in tied,
        ):
            problems.append(f"{module}: stored quantised, but {target} is {what}")
        elif tuple(parameters[target].shape) != (spec.n, spec.k):
            problems.append(
                f"{module}: stored as {[spec.n, spec.k]}, {target} is"
                f" {list(parameters[target].shape)}"
            )
        else:
            specs[target] = spec
    filled = {*specs, *stacks} | {
        target for name in checkpoint.dense_names for target in names[name].targets
    }
    problems += _unfilled_problems(checkpoint.config, parameters, owners, filled | tied, homeless)
    problems += _dense_problems(checkpoint, names, parameters, owners, tied)
    if problems:
        raise SvskFormatError(listed(sorted(problems)))
    return specs, stacks


def _not_taken(owner: type, *, is_table: bool, tied: bool) -> str | None:
    """What is in the way of a quantised weight in a module; None if nothing is.

    A table may be the head as well: transformers ties the two once the table is there.
    """
    kind = torch.nn.Embedding if is_table else torch.nn.Linear
    if tied and not is_table:
        return "tied to another, not a plain torch.nn.Linear"
    if not issubclass(owner, kind):
        return f"part of a {owner.__name__}, not a plain torch.nn.{kind.__name__}"
    return None


def _unfilled_problems(
    config: SvskCheckpointConfig,
    parameters: Mapping[str, torch.Tensor],
    owners: Mapping[str, type],
    filled: Iterable[str],
    homeless: list[str],
) -> list[str]:
    """Parameters that would be left at random values where quantised weights are to blame.

    Quantised linears the model has no use for (``homeless``) are no problem by themselves: a model
    without a head does not load the head.
    """
    problems = []
    for name in parameters.keys() - set(filled):
        if homeless and parameters[name].ndim > 2:
            problems.append(
                f"{name}: transformers fuses linears such as {homeless[0]},"
                " which is stored quantised, into one parameter of shape"
                f" {list(parameters[name].shape)}. {USE_RESTORE}"
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
    checkpoint: Checkpoint,
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
    for name in checkpoint.dense_names:
        target, pattern = names[name].targets[0], names[name].pattern
        if pattern is not None or target not in parameters:
            continue
        shape, expected = checkpoint.tensors.describe(name).shape, parameters[target].shape
        is_linear = name.endswith(".weight") and issubclass(owners[_owner(target)], torch.nn.Linear)
        targeted = checkpoint.config.scheme_for(_owner(name)) is not None
        if is_linear and target not in tied and targeted:
            problems.append(
                f"{name}: stored dense, but a config group targets it; put it on the ignore list"
            )
        elif shape != expected:
            problems.append(f"{name}: shape {list(shape)}, the model has {list(expected)}")
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
