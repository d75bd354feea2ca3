# SPDX-License-Identifier: Apache-2.0
"""The weight that gives the dense model's outputs for the inputs of the quantised one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from svsk_offline.calibration.cross_moment import PairedMoments
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.quantizers.hessian import ColumnOrder

__all__ = ["Aim", "aims", "stage_aims"]

_DAMPINGS: Final = (0.01, 0.1, 1.0)
"""Dampings of the correction that are tried, relative to the mean of the Hessian's diagonal.

On SmolLM2's q, k and v the least one does best on text that is held out, on its down_proj, whose
input is wider and so has fewer tokens for each of its channels, the largest.
"""


@dataclass(frozen=True)
class Aim:
    """What base and sidecar are fitted to, in place of the stored weight.

    Attributes:
        weight: float32 [N, K].
        share: of the correction, 0 to 1.
    """

    weight: torch.Tensor
    share: float


def stage_aims(
    weights: dict[str, torch.Tensor],
    fitted: Mapping[str, InputStatistics],
    moments: dict[str, PairedMoments],
    sinks: Mapping[str, float],
    *,
    most: float = 1.0,
) -> dict[str, Aim]:
    """What linears of one input aim at, those whose tokens count alike together.

    Args:
        weights: by name, float32 [N, K]; emptied.
        fitted: second moments of the input in the quantised model by these names, over the samples
            that are fitted.
        moments: of the input in both models by these names; emptied, for they are as large as the
            matrices of a fit.
        sinks: by these names, how much more a sample's first token counts.
        most: largest share.

    Returns:
        By name.

    Raises:
        SvskError: a Hessian cannot be used.
    """
    together: dict[tuple[int, float], list[str]] = {}
    for name, pair in moments.items():
        together.setdefault((id(pair), sinks[name]), []).append(name)
    found: dict[str, Aim] = {}
    for (_, sink), alike in together.items():
        of_these = {name: weights.pop(name) for name in alike}
        pair = moments[alike[0]]
        for name in alike:
            del moments[name]
        missing, unseen = (
            {name: cross.product(name, sink) for name in alike}
            for cross in (pair.fitted, pair.held_out)
        )
        held_out = pair.second
        del pair  # before Hessians are decomposed
        statistics = fitted[alike[0]]
        found |= aims(of_these, missing, unseen, statistics, held_out, most=most, sink_weight=sink)
    return found


def aims(
    weights: dict[str, torch.Tensor],
    missing: dict[str, torch.Tensor],
    unseen: dict[str, torch.Tensor],
    fitted: InputStatistics,
    held_out: InputStatistics,
    *,
    most: float = 1.0,
    sink_weight: float = 0.0,
) -> dict[str, Aim]:
    """What linears of one input aim at.

    Without rounding ``E|W x - V q|^2`` is least at ``V = W + D``, ``D = W E[(x - q) q^T] H^-1``, x
    the input in the dense model, q in the quantised one and H the damped second moment of q (Li et
    al., GPTAQ, arXiv 2504.02692). D has K unknowns for each output, and follows the text that it
    is fitted to. So a linear takes the share a of it, and the damping, with the least error on
    tokens that are held out: there it is ``|W (x - q)|^2 - 2 a <D, W E[(x - q) q^T]> + a^2 <D, D
    H>``, all moments those of the tokens held out.

    Args:
        weights: W by name, float32 [N, K].
        missing: ``W E[(x - q) q^T]`` by name over the samples that are fitted, float32 [N, K]
            (:meth:`svsk_offline.calibration.cross_moment.CrossMoment.product`).
        unseen: the same over those held out.
        fitted: of q.
        held_out: likewise over the samples held out.
        most: largest share.
        sink_weight: weight of the first token's second moment in the Hessians, as in the products.

    Returns:
        By name; the weight itself, and a share of 0, where no share does better.

    Raises:
        SvskError: a Hessian cannot be used.
    """
    # Before the sink is added, which would raise the damping of every channel.
    mean = float(fitted.hessian.diagonal().mean())
    hessian, unseen_hessian = (_with_sink(one, sink_weight) for one in (fitted, held_out))
    found = {name: Aim(weight, 0.0) for name, weight in weights.items()}
    least = dict.fromkeys(weights, 0.0)
    for damping in _DAMPINGS:
        order = ColumnOrder.of(hessian, damping, mean)
        for name, rows in missing.items():
            correction = order.unfactored(rows[:, order.order] @ order.root.T)
            along = _inner(correction, unseen[name])
            energy = _inner(correction @ unseen_hessian, correction)
            share = min(most, max(0.0, along / energy)) if energy > 0 else 0.0
            change = share * (share * energy - 2 * along)
            if change < least[name]:
                least[name] = change
                found[name] = Aim(weights[name] + share * correction, share)
        del order  # before the next one is made
    return found


def _with_sink(statistics: InputStatistics, sink_weight: float) -> torch.Tensor:
    if not sink_weight:
        return statistics.hessian
    return statistics.hessian + sink_weight * statistics.first_hessian


def _inner(left: torch.Tensor, right: torch.Tensor) -> float:
    """Sum of the products of two matrices' elements."""
    return float((left * right).sum(dtype=torch.float64))
