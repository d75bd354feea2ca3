# SPDX-License-Identifier: Apache-2.0
"""Two-level scales: a small integer per group times one value per row."""

import torch

__all__ = ["expand_scales"]


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
