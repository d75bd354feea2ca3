# SPDX-License-Identifier: Apache-2.0
"""How the input that a linear has in the dense model goes with the one in the quantised model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.world import World

__all__ = ["CrossMoment", "PairedMoments"]


class CrossMoment:
    """``W E[(x - q) q^T]`` of linears of one input, x in the dense model and q in the quantised.

    Accumulated in float32, sample by sample: the moment, [K, K], or its products with the weights
    where the linears have so few outputs that these take fewer multiplications.

    Args:
        weights: W by name, float32 [N, K] where the inputs are; not copied.
        first: keep that of the first tokens apart as well.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], *, first: bool = False) -> None:
        self._weights = dict(weights)
        outputs = sum(len(weight) for weight in weights.values())
        one = next(iter(weights.values()))
        features = one.shape[1]
        # A token costs K * K multiplications, or N * K to project it and N * K to add it up.
        self._stacked = torch.cat([*weights.values()]) if 2 * outputs < features else None
        shape = (features if self._stacked is None else outputs, features)
        self._sum = torch.zeros(shape, device=one.device)
        self._first = torch.zeros(shape, device=one.device) if first else None
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
        if self._stacked is not None:
            missing = missing @ self._stacked.T
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

    def add_up(self, world: World) -> None:
        """Add up what all processes took in, at all of them."""
        counts = (self._weight, self._samples)
        self._weight, samples = world.add_up((self._sum, self._first), counts)
        self._samples = int(samples)

    def empty(self) -> "CrossMoment":
        """A moment of the same linears that has taken in nothing; they share the weights."""
        other = copy.copy(self)
        other._sum = torch.zeros_like(self._sum)
        other._first = None if self._first is None else torch.zeros_like(self._first)
        other._weight, other._samples = 0.0, 0
        return other

    def product(self, name: str, sink_weight: float = 0.0) -> torch.Tensor:
        """``W E[(x - q) q^T]`` of a linear, float32 [N, K].

        Args:
            name: of the linear.
            sink_weight: weight of the first token's moment, which is added.
        """
        # 0 where nothing was taken in, not NaN
        rows = self._of(name, self._sum) / (self._weight or 1.0)
        if sink_weight and self._first is not None:
            rows += sink_weight / max(1, self._samples) * self._of(name, self._first)
        return rows

    def _of(self, name: str, total: torch.Tensor) -> torch.Tensor:
        if self._stacked is None:
            return self._weights[name] @ total
        sizes = [len(weight) for weight in self._weights.values()]
        parts: Sequence[torch.Tensor] = total.split(sizes)
        return dict(zip(self._weights, parts, strict=True))[name]


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

    def add_up(self, world: World) -> None:
        """Add up what all processes took in, at all of them."""
        self.fitted.add_up(world)
        self.held_out.add_up(world)
        self.second.add_up(world, None)
