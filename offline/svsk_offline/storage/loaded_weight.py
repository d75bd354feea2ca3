# SPDX-License-Identifier: Apache-2.0
"""The stored weight of a linear whose block is loaded, and what is loaded in its place."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import QuantizedLinear, dequantize

__all__ = ["loaded_weight", "put_weights"]


def loaded_weight(source: ModelSource, name: str, linear: nn.Linear) -> torch.Tensor:
    """The values that are stored for a linear of a loaded block, on the block's device.

    They are the loaded ones, unless these were rounded to the dtype in which the block runs: then
    the tensor is read again.

    Args:
        source: the dense model.
        name: of the linear in the folder.
        linear: the module, loaded and not changed since.

    Returns:
        Floating [N, K], in the stored dtype or float32. Not to be written to: it may be the block's
        own.
    """
    loaded = linear.weight.detach()
    stored = source.tensors.describe(f"{name}.weight").dtype
    widened = loaded.dtype == torch.float32 and stored.itemsize < loaded.dtype.itemsize
    if loaded.dtype == stored or widened:
        return loaded
    return source.tensors.read(f"{name}.weight").to(loaded.device)


def put_weights(
    block: nn.Module, names: Mapping[str, str], linears: Iterable[QuantizedLinear]
) -> None:
    """Replace a loaded block's weights by what quantised linears stand for.

    Args:
        block: the block.
        names: of its linears below it, by their names in the folder.
        linears: those that are replaced.
    """
    for linear in linears:
        weight = block.get_parameter(f"{names[linear.spec.name]}.weight")
        weight.data = dequantize(linear).to(weight.device, weight.dtype)
