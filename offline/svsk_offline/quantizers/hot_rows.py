# SPDX-License-Identifier: Apache-2.0
"""Rows of common tokens in 8 bits, the others in 4: the original's scheme for tables.

As there, nothing but the row's own values decides how it is rounded.
"""

from collections.abc import Collection
from typing import Final

import torch

from svsk_offline.quantizers.eight_bits import round_to_eight_bits
from svsk_offline.quantizers.gptq import search_scales
from svsk_offline.quantizers.rounding import require_finite, scaled_codes
from svsk_vllm.format import ConfigGroup, LinearSpec, QuantizedLinear, WeightArgs
from svsk_vllm.format.hot_rows import join_rows, split_rows

__all__ = ["common_tokens", "round_with_hot_rows"]

_PIECE: Final = 1 << 24
"""Weights that are rounded at a time: a table may be larger than memory has room for in float32."""


def common_tokens(
    tokens: torch.Tensor, special: Collection[int], vocabulary: int, count: int
) -> torch.Tensor:
    """The most common tokens of a text; of equally common ones those of the lower number.

    Special tokens come before all others: those that end a turn need not occur in plain text, and
    are read in every answer.

    Args:
        tokens: int64, any shape, each below ``vocabulary``.
        special: numbers of special tokens, each below ``vocabulary``.
        vocabulary: how many tokens there are.
        count: how many are wanted, fewer than there are.

    Returns:
        int32 [count], ascending.
    """
    frequency = torch.bincount(tokens.flatten().cpu(), minlength=vocabulary)
    frequency[torch.tensor(sorted(special), dtype=torch.int64)] = frequency.max() + 1
    order = frequency.argsort(descending=True, stable=True)
    return order[:count].sort().values.to(torch.int32)


@torch.no_grad()
def round_with_hot_rows(
    weight: torch.Tensor, spec: LinearSpec, hot: torch.Tensor, device: torch.device
) -> QuantizedLinear:
    """Round hot rows to 8 bits, the others to 4 with searched scales.

    Args:
        weight: [N, K], any floating dtype.
        spec: shape and scheme, with so many hot rows as are given.
        hot: int32 [h], ascending.
        device: where to compute.

    Returns:
        The quantised matrix, on the CPU.

    Raises:
        SvskError: a weight is not finite in the scale's dtype.
    """
    others, common = split_rows(weight.cpu(), hot)
    group = ConfigGroup(
        targets=spec.scheme.targets,
        weights=WeightArgs(num_bits=8, codebook="int8", group_size=spec.group_size),
    )
    eight = round_to_eight_bits(
        common, LinearSpec(spec.name, len(common), spec.k, group, spec.scale_dtype)
    )
    importance = torch.ones(spec.k, device=device)
    codes, scales = [], []
    for piece in others.split(max(1, _PIECE // spec.k)):
        part = piece.to(device, torch.float32)
        require_finite(part, spec)
        scale = search_scales(part, importance, spec.group_size, "int4", spec.scales)
        rounded, _ = scaled_codes(part.unflatten(1, (-1, spec.group_size)), scale.float(), "int4")
        codes.append(rounded.flatten(1).cpu())
        scales.append(scale.cpu())
    return QuantizedLinear(
        spec,
        join_rows(torch.cat(codes), eight.codes, hot),
        join_rows(torch.cat(scales), eight.scale, hot),
        hot=hot,
    )
