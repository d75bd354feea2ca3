# SPDX-License-Identifier: Apache-2.0
"""Two-level scales: a small integer per group times one value per row."""

from typing import Any

import torch

__all__ = ["expand_scales", "pop_scales"]


def expand_scales(group_codes: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Scales of the groups of a layer whose scales have two levels (docs/format.md).

    A row scale's significand has at most 9 - b bits for codes of b bits, so that no product is
    rounded, in bfloat16 either, whose significand has 8.

    Args:
        group_codes: int8 [n, groups], -128 to 127.
        row_scale: floating [n, 1].

    Returns:
        [n, groups] of the dtype of ``row_scale``, each ``group_codes * row_scale``.
    """
    return group_codes.to(row_scale.dtype) * row_scale


def pop_scales(layer: Any) -> torch.Tensor:
    """The scales of a loaded layer's groups, multiplied out where they have two levels.

    For kernels that take one level: row scales are taken off the layer, which would keep them in
    memory for nothing.

    Args:
        layer: with the parameters of :class:`svsk_kernels.layer_kernel.LayerSpec`.

    Returns:
        floating [n, groups].
    """
    scale: torch.Tensor = layer.weight_scale.data
    if not hasattr(layer, "weight_row_scale"):
        return scale
    row_scale = layer.weight_row_scale.data
    del layer.weight_row_scale
    return expand_scales(scale, row_scale)
