# SPDX-License-Identifier: Apache-2.0
"""The weights of a part of a model: filled from stored tensors, and dropped again."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from svsk_offline.storage.tensor_names import TensorMap

__all__ = ["drop", "fill", "kept_in_float32"]


def fill(
    module: nn.Module,
    prefix: str,
    names: Iterable[str],
    tensors: TensorMap,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    keep: re.Pattern[str] | None,
    device: torch.device,
) -> None:
    """Fill parameters and buffers of a module by name; tied ones share their memory.

    Args:
        module: part of a model.
        prefix: its name, followed by a dot unless empty.
        names: of the parameters and buffers below it.
        tensors: which stored tensor fills which of the model's.
        read: a stored tensor by name.
        dtype: floating dtype of what is filled.
        keep: pattern of names, in the model, that get float32 instead; None for none.
        device: where to put it.
    """
    known: dict[str, torch.Tensor] = {}
    state = {}
    for name in names:
        full = prefix + name
        if not tensors.inputs_of(full):
            continue  # a buffer, which keeps the value that the model class gives it
        stored = tensors.sources.get(full)
        if stored is None:
            tensor = tensors.convert(full, read)
        else:
            tensor = known[stored] if stored in known else read(stored)
        if tensor.is_floating_point():
            tensor = tensor.to(device, torch.float32 if keep and keep.search(full) else dtype)
        state[name] = tensor.to(device)
        if stored is not None:
            known[stored] = state[name]
    module.load_state_dict(state, assign=True, strict=False)
    _move_buffers(module, device)


def drop(module: nn.Module) -> None:
    """Drop the weights of a module; buffers, held by nothing else, stay."""
    for owner in module.modules():
        for key, parameter in owner.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="meta")
            setattr(owner, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    _move_buffers(module, torch.device("cpu"))


def kept_in_float32(model: nn.Module) -> re.Pattern[str] | None:
    """Pattern of what a model class computes in float32 whatever the dtype, or None."""
    from transformers.core_model_loading import build_glob_alternation

    keep = getattr(model, "_keep_in_fp32_modules_strict", None)
    if not keep:
        return None
    pattern: re.Pattern[str] = build_glob_alternation(sorted(keep))[0]
    return pattern


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            setattr(owner, key, buffer.to(device))
