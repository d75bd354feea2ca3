# SPDX-License-Identifier: Apache-2.0
"""Rounding to 8 bits, for embedding tables and output heads."""

from typing import Final

import torch

from svsk_offline.quantizers.rounding import require_finite
from svsk_vllm.format import LinearSpec, QuantizedLinear

__all__ = ["round_to_eight_bits"]

_LARGEST: Final = 127
"""The code of a group's largest magnitude; -128 has no counterpart."""
_PIECE: Final = 1 << 24
"""Weights that are rounded at a time: a table may be larger than memory has room for in float32."""


@torch.no_grad()
def round_to_eight_bits(weight: torch.Tensor, spec: LinearSpec) -> QuantizedLinear:
    """Round every weight to the nearest of 255 multiples of its group's scale.

    The scale is the group's largest magnitude over 127, rounded to its stored dtype before the
    codes are chosen. Zero where the group is, or where it is too small for that dtype.

    Args:
        weight: [N, K], any floating dtype.
        spec: shape and scheme, of codebook ``int8``.

    Returns:
        The quantised matrix, on the CPU.

    Raises:
        SvskError: a weight is not finite in the scale's dtype, which is the model's.
    """
    codes = torch.empty(spec.n, spec.k, dtype=torch.int8)
    scale = torch.empty(spec.n, spec.k // spec.group_size, dtype=spec.scale_dtype)
    rows = max(1, _PIECE // spec.k)
    for start in range(0, spec.n, rows):
        part = slice(start, start + rows)
        groups = weight[part].float().cpu().unflatten(1, (-1, spec.group_size))
        require_finite(groups, spec)
        rounded = (groups.abs().amax(2) / _LARGEST).to(spec.scale_dtype)
        wide = rounded.float().unsqueeze(2)
        steps = torch.where(wide == 0, 0.0, groups / wide).round_().clamp_(-_LARGEST, _LARGEST)
        codes[part], scale[part] = steps.flatten(1).to(torch.int8), rounded
    return QuantizedLinear(spec, codes, scale)
