# SPDX-License-Identifier: Apache-2.0
"""Reading a model's tensors by name: as stored, folded, or as a checkpoint stands for them."""

from typing import Protocol

import torch

from svsk_offline.storage.fold import Fold
from svsk_vllm.format import Checkpoint, restored_weight
from svsk_vllm.format.spec import TensorSpec

__all__ = ["FoldedTensors", "RestoredTensors", "TensorReader"]


class TensorReader(Protocol):
    """What a model is read through; :class:`svsk_vllm.format.ShardedReader` is one."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""

    def __contains__(self, name: str) -> bool: ...

    def shard_of(self, name: str) -> str:
        """File name of the shard that holds ``name``."""

    def describe(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading its data."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU."""


class FoldedTensors:
    """Tensors multiplied by a fold's factors as they are read.

    Args:
        stored: gives them as they are stored.
        fold: the factors.
    """

    def __init__(self, stored: TensorReader, fold: Fold) -> None:
        self._stored, self._fold = stored, fold

    @property
    def names(self) -> list[str]:
        return self._stored.names

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shard_of(self, name: str) -> str:
        return self._stored.shard_of(name)

    def describe(self, name: str) -> TensorSpec:
        spec = self._stored.describe(name)
        if name not in self._fold:
            return spec
        return TensorSpec(self._fold.dtype(name, spec.dtype), spec.shape)

    def read(self, name: str) -> torch.Tensor:
        return self._fold.scale(name, self._stored.read(name))


class RestoredTensors:
    """The dense tensors that a checkpoint stands for, each dequantised when it is read.

    Args:
        checkpoint: it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

        self._dense = dict.fromkeys(checkpoint.dense_names)
        self._quantised = {f"{name}.weight": name for name in checkpoint.linears}

    @property
    def names(self) -> list[str]:
        return [*self._dense, *self._quantised]

    def __contains__(self, name: str) -> bool:
        return name in self._quantised or name in self._dense

    def shard_of(self, name: str) -> str:
        stored = f"{self._quantised[name]}.weight_packed" if name in self._quantised else name
        return self._checkpoint.tensors.shard_of(stored)

    def describe(self, name: str) -> TensorSpec:
        if name not in self._quantised:
            return self._checkpoint.tensors.describe(name)
        spec = self._checkpoint.linears[self._quantised[name]]
        return TensorSpec(spec.scale_dtype, (spec.n, spec.k))

    def read(self, name: str) -> torch.Tensor:
        if name not in self._quantised:
            return self._checkpoint.read_dense(name)
        return restored_weight(self._checkpoint.read_linear(self._quantised[name]))
