# SPDX-License-Identifier: Apache-2.0
"""The base of the published recipe: rounding with activation-aware clipping of each group."""

from collections.abc import Sequence

import torch

from svsk_offline.quantizers.rounding import absmax_scale, scaled_codes
from svsk_vllm.format import Codebook
from svsk_vllm.format.group_scales import GroupScales

__all__ = ["channel_importance", "quantize_aa"]


def channel_importance(
    second_moment: torch.Tensor, alpha: float, bounds: tuple[float, float]
) -> torch.Tensor:
    """Weight of each input channel's error: ``clip((E[x_j^2] / mean) ** alpha, *bounds)``.

    The mean is that of the channels in use: one that is always zero has the smallest importance and
    leaves those of the others as they are.

    Args:
        second_moment: float32 [K], ``E[x_j^2]`` over calibration tokens.
        alpha: exponent.
        bounds: smallest and largest importance.

    Returns:
        float32 [K].
    """
    used = second_moment > 0
    mean = second_moment.sum() / used.sum().clamp_min(1)
    relative = torch.where(used, second_moment / torch.where(mean > 0, mean, 1.0), 0.0)
    return torch.where(used, relative.pow(alpha).clamp(*bounds), bounds[0])


def quantize_aa(
    weight: torch.Tensor,
    importance: torch.Tensor,
    group_size: int,
    codebook: Codebook,
    stored: GroupScales,
    clip_grid: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round under the clip of each group's maximum with the least weighted squared error.

    Scales are rounded to what can be stored before the codes are chosen. A clip of 1 is plain
    rounding to nearest, so the weighted error of no group exceeds that of plain rounding.

    Args:
        weight: float32 [N, K], K a multiple of ``group_size``.
        importance: float32 [K].
        group_size: weights per scale.
        codebook: the 16 levels.
        stored: how scales are stored.
        clip_grid: factors in (0, 1].

    Returns:
        int8 codes [N, K] and scales [N, K / group_size] of the stored dtype.
    """
    groups = weight.view(weight.shape[0], -1, group_size)
    weights = importance.view(-1, group_size)
    full = absmax_scale(groups, codebook)
    best_error = torch.full_like(full, torch.inf)
    best_codes = torch.zeros_like(groups, dtype=torch.int8)
    best_scale = torch.zeros_like(full)
    row_scale = stored.row_scale(full)
    for clip in clip_grid:
        scale = stored.round(full * clip, row_scale)
        codes, values = scaled_codes(groups, scale, codebook)
        error = ((groups - values).square_() * weights).sum(-1)
        better = error < best_error  # of equal ones the first, in the order of the grid
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
    return best_codes.flatten(1), best_scale.to(stored.dtype)
