# SPDX-License-Identifier: Apache-2.0
"""The weight that gives the dense model's outputs for the inputs of the quantised one."""

import torch

from svsk_offline.calibration.cross_moment import CrossMoment
from svsk_offline.quantizers.hessian import ColumnOrder

__all__ = ["aimed_weight"]


def aimed_weight(
    weight: torch.Tensor,
    cross: CrossMoment,
    order: ColumnOrder,
    share: float,
    sink_weight: float = 0.0,
) -> torch.Tensor:
    """What base and sidecar are fitted to, in place of the stored weight.

    Without rounding ``E|W x - V q|^2`` is least at ``V = W (I + E[(x - q) q^T] H^-1)``, x the input
    in the dense model, q in the quantised one and H the damped second moment of q (Li et al.,
    GPTAQ, arXiv 2504.02692).

    Args:
        weight: W, float32 [N, K].
        cross: of the input.
        order: of H, which holds the sink weight.
        share: of the correction, 0 to 1.
        sink_weight: weight of the first token's moment.

    Returns:
        float32 [N, K].
    """
    rows = cross.product(weight, sink_weight)
    # H^-1 = U^T U in the order in which columns are processed.
    return weight + share * order.unfactored(rows[:, order.order] @ order.root.T)
