# SPDX-License-Identifier: Apache-2.0
"""The plainest base, which every other one is compared with."""

import torch

from svsk_offline.quantizers.rounding import absmax_scale, scaled_codes
from svsk_vllm.format import Codebook


def quantize_rtn(
    weight: torch.Tensor, group_size: int, codebook: Codebook, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest with absolute-maximum scales.

    The plainest base, and the bound for the others.

    Args:
        weight: float32 [N, K], K a multiple of ``group_size``.
        group_size: weights per scale.
        codebook: the 16 levels.
        scale_dtype: stored dtype of the scales.

    Returns:
        int8 codes [N, K] and scales [N, K / group_size] of ``scale_dtype``.
    """
    groups = weight.view(weight.shape[0], -1, group_size)
    scale = absmax_scale(groups, codebook).to(scale_dtype)
    codes, _ = scaled_codes(groups, scale.float(), codebook)
    return codes.flatten(1), scale
