# SPDX-License-Identifier: Apache-2.0
"""How the input that a linear has in the dense model goes with the one in the quantised model."""

from dataclasses import dataclass

import torch

from svsk_offline.calibration.input_statistics import InputStatistics

__all__ = ["CrossMoment", "PairedMoments"]


class CrossMoment:
    """``E[(x - q) q^T]``, x a linear's input in the dense model and q in the quantised one.

    Accumulated in float32, sample by sample.

    Args:
        features: number of input channels K.
        device: where the inputs are.
        first: keep that of the first tokens apart as well.
    """

    def __init__(self, features: int, device: torch.device, *, first: bool = False) -> None:
        self._sum = torch.zeros(features, features, device=device)
        self._first = torch.zeros(features, features, device=device) if first else None
        self._weight = 0.0
        self._samples = 0

    def add(
        self, dense: torch.Tensor, quantised: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Take in the inputs of some samples.

        Args:
            dense: float [samples, tokens, K], x; or [tokens, K] without first tokens.
            quantised: q, likewise.
            weights: how much each token counts, float [samples, tokens] or [tokens]; None is 1
                each.
        """
        given = quantised.detach().float()
        missing = dense.detach().float() - given
        if given.ndim == 3 and self._first is not None:
            self._first.addmm_(missing[:, 0].T, given[:, 0])
            self._samples += len(given)
        rows = missing.flatten(0, -2)
        if weights is None:
            self._weight += len(rows)
        else:
            rows = rows * weights.reshape(-1, 1).to(rows)
            self._weight += float(weights.sum())
        self._sum.addmm_(rows.T, given.flatten(0, -2))

    def product(self, weight: torch.Tensor, sink_weight: float = 0.0) -> torch.Tensor:
        """``W E[(x - q) q^T]``, float32 [N, K].

        Args:
            weight: W, float32 [N, K].
            sink_weight: weight of the first token's moment, which is added.
        """
        # 0 where nothing was taken in, not NaN
        rows = weight @ self._sum / (self._weight or 1.0)
        if sink_weight and self._first is not None:
            rows += sink_weight / max(1, self._samples) * (weight @ self._first)
        return rows


@dataclass(frozen=True)
class PairedMoments:
    """Moments of a linear's input in both models.

    Attributes:
        fitted: over the samples that are fitted.
        held_out: the same over those held out.
        second: second moment of the input in the quantised model over those held out.
    """

    fitted: CrossMoment
    held_out: CrossMoment
    second: InputStatistics
