# SPDX-License-Identifier: Apache-2.0
"""What a kernel for whole layers is: the seam between the vLLM plugin and the devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from svsk_kernels.codebook import Codebook
from svsk_kernels.sidecar_plan import SidecarPlan

__all__ = ["LayerKernel", "LayerSpec", "TableKernel", "replace_parameters", "stored_tensors"]


@dataclass(frozen=True)
class LayerSpec:
    """One (possibly fused and sharded) layer as a process holds it.

    A loaded layer has these parameters, which :meth:`LayerKernel.prepare` reads:

    - ``weight_packed``: int32 [n, k / 8], of codebook ``int8`` [n, k / 4], codes as in the
      checkpoint;
    - ``weight_scale``: ``dtype`` [n, k / group_size], the scale of each group;
    - with ``row_scaled``, ``weight_scale`` is int8 instead and ``weight_row_scale`` is ``dtype``
      [n, 1]: a group's scale is the product of the two, exact in ``dtype``
      (:func:`svsk_kernels.group_scales.expand_scales`);
    - with a plan, ``sidecar_u`` and ``sidecar_v`` int8 and ``sidecar_gain`` float32, flat as
      :mod:`svsk_kernels.sidecar_plan` says.
    """

    n: int
    k: int
    group_size: int  # 16, 32 or 64
    codebook: Codebook
    dtype: torch.dtype  # of activations, outputs and scales
    plan: SidecarPlan | None = None  # None: no sidecar
    factor_bits: Literal[4, 8] = 8  # 4 when no part's factors have more
    row_scaled: bool = False  # scales of two levels: an integer per group times a value per row
    lookup: bool = False  # an embedding table: rows of the weight are looked up too
    batch_invariant: bool = False  # a row's result has the same bits whatever rows are beside it

    @property
    def is_table(self) -> bool:
        """Whether it is an embedding or an output head: a model has one each at most."""
        return self.lookup or self.codebook == "int8"


class LayerKernel(Protocol):
    """Runs a layer.

    It keeps no tensors: they are the layer's parameters, where a reload finds and replaces them.
    """

    def prepare(self, layer: torch.nn.Module) -> None:
        """Replace the loaded parameters by those the kernel runs on."""

    def __call__(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``x W_hat^T + bias``.

        [M, n] from [M, k], both of the layer's dtype, with a prepared layer.
        """


@runtime_checkable
class TableKernel(LayerKernel, Protocol):
    """A kernel that can also look up rows of a prepared layer whose spec says ``lookup``."""

    def rows(self, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ``W_hat``, rounded once to the layer's dtype.

        Args:
            layer: prepared.
            ids: int64 [M], each below ``n``.

        Returns:
            [M, k] of the layer's dtype.
        """


def replace_parameters(layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Register the tensors as plain parameters, in place of those of the same names."""
    for name, tensor in tensors.items():
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))


def stored_tensors(layer: Any) -> Mapping[str, Any]:
    """Parameters of a module, or attributes of another object, by name.

    Kernels that take many read them here: each attribute of a module that is a parameter is looked
    for in other places first, which takes half a microsecond.
    """
    return layer._parameters if isinstance(layer, torch.nn.Module) else vars(layer)
