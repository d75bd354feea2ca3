# SPDX-License-Identifier: Apache-2.0
"""What goes into a GGUF file, and under which name and in which order of rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.export.gguf.blocks import TYPE_OF, pack_blocks
from svsk_offline.export.gguf.file import Describe, GgufTensor, dense_bytes, dense_type
from svsk_vllm.format import Checkpoint

__all__ = [
    "Placed",
    "Plan",
    "dense_tensor",
    "file_type",
    "gguf_names",
    "linear_tensor",
    "weight_in_order",
]


@dataclass(frozen=True)
class Placed:
    """Where a quantised module's weight goes.

    Attributes:
        name: of the weight in GGUF.
        order: its rows there, as an index of the checkpoint's, int64 [N]; None: as they are.
    """

    name: str
    order: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """A GGUF file to write.

    Attributes:
        architecture: GGUF's name of it.
        describe: adds the metadata.
        tensors: in the order of the file.
        placed: the quantised modules, by name in the checkpoint.
    """

    architecture: str
    describe: Describe
    tensors: list[GgufTensor]
    placed: dict[str, Placed]


def gguf_names(source: Checkpoint, architecture: str) -> dict[str, str]:
    """GGUF's name of each tensor of the checkpoint that has a place there.

    Quantised modules count under the name of their dense weight.

    Raises:
        SvskError: GGUF has no such architecture, or no place for a quantised weight.
    """
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise SvskError(
            f"architecture {architecture!r}: unknown to the package gguf."
            " Install a newer one: pip install --upgrade gguf."
        )
    blocks = source.hf_config.get("num_hidden_layers")
    if not isinstance(blocks, int):
        raise SvskError(
            f"{source.folder / 'config.json'}: num_hidden_layers is {blocks!r}, expected a number."
        )
    table = gguf.get_tensor_name_map(known[architecture], blocks)

    def of(name: str) -> str | None:
        found: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    weights = [f"{module}.weight" for module in source.linears]
    names = {name: new for name in [*weights, *source.dense_names] if (new := of(name))}
    for weight in weights:
        if weight not in names:
            raise SvskError(f"{weight}: GGUF's architecture {architecture} has no place for it.")
    return names


def weight_in_order(weight: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The rows of a weight as a file has them."""
    return weight if order is None else weight[order]


def linear_tensor(source: Checkpoint, module: str, placed: Placed) -> GgufTensor:
    """The base of a quantised module."""
    spec = source.linears[module]

    def read() -> np.ndarray[Any, Any]:
        packed = pack_blocks(source.read_linear(module))
        data: np.ndarray[Any, Any] = weight_in_order(packed, placed.order).numpy()
        return data

    kind = TYPE_OF[spec.scheme.weights.joined_codebook]
    return GgufTensor(placed.name, kind, (spec.n, spec.k), read)


def dense_tensor(name: str, tensor: torch.Tensor) -> GgufTensor:
    """A tensor that is stored as it is."""
    return GgufTensor(name, dense_type(tensor), tuple(tensor.shape), lambda: dense_bytes(tensor))


def file_type(source: Checkpoint, placed: Mapping[str, Placed]) -> int:
    """``general.file_type``: what most linears are stored as."""
    kinds = [TYPE_OF[source.linears[module].scheme.weights.joined_codebook] for module in placed]
    most = "Q4_0" if kinds.count("Q4_0") * 2 >= len(kinds) else "Q8_0"
    return int(gguf.LlamaFileType[f"MOSTLY_{most}"])
