# SPDX-License-Identifier: Apache-2.0
"""The decoder blocks of a transformers model, and the linears in them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from svsk_kernels.errors import SvskError
from svsk_vllm.architecture.experts import SeparateExperts

__all__ = ["decoder_blocks", "expert_modules", "linear_modules"]


def decoder_blocks(model: Any, folder: Path) -> tuple[str, nn.ModuleList]:
    """Name and modules of a model's decoder blocks.

    Args:
        model: a causal language model of transformers.
        folder: it comes from, for errors.

    Raises:
        SvskError: there is no module list of ``num_hidden_layers`` blocks holding ``nn.Linear``, or
            the blocks hold stacks of expert matrices.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(True for _ in linear_modules(module))
    ]
    # A tower for images may have as many blocks.
    lists.sort(key=lambda named: id(named[1]) not in inside)
    if not lists:
        raise SvskError(
            f"{folder}: found no list of {count} decoder blocks with nn.Linear layers in"
            f" {type(model).__name__}. Supported are Llama, Qwen2, Qwen3, Mistral and models built"
            " like them."
        )
    name, blocks = lists[0]
    if (experts := _expert_stack(blocks, config)) is not None:
        raise SvskError(
            f"{folder}: {name}.{experts} is a stack of expert matrices. Experts are quantised where"
            " the folder stores the gate, up and down matrix of each one by one, without biases,"
            " as those of Qwen3-MoE, Mixtral, OLMoE or DeepSeek do."
        )
    return name, blocks


def linear_modules(module: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """Names and modules of the ``nn.Linear`` layers below ``module``."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))


def expert_modules(module: nn.Module) -> dict[str, SeparateExperts]:
    """The mixtures of experts below ``module``, by the name of each linear in one."""
    return {
        f"{name}.{linear}": experts
        for name, experts in module.named_modules()
        if isinstance(experts, SeparateExperts)
        for linear, _ in linear_modules(experts)
    }


def _expert_stack(blocks: nn.ModuleList, config: Any) -> str | None:
    """Name of a parameter below the blocks with a matrix per expert; no convolution's."""
    counts = {
        value
        for key, value in config.to_dict().items()
        if "expert" in key and isinstance(value, int)
    }
    for name, parameter in blocks.named_parameters():
        if parameter.ndim > 2 and ("expert" in name or parameter.shape[0] in counts - {0, 1}):
            owner = blocks.get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                return name
    return None
