# SPDX-License-Identifier: Apache-2.0
"""How much errors of a linear's outputs count, alone and together."""

from dataclasses import dataclass
from typing import Final

import torch

from svsk_offline.quantizers.lowrank import leading_eigenvectors

__all__ = ["RowMetric"]

_COUNTED: Final = 0.9
"""Share of what output features have in common that is counted.

It is measured on few tokens, so that some of it is chance.
"""

_FLOOR: Final = 1e-3
"""Least that a feature counts of its own, relative to the mean: no error is ever free."""


@dataclass(frozen=True)
class RowMetric:
    """A quadratic form over output features, ``G = diag(own) + directions^T directions``.

    The second-order change of the loss by an error E of a weight is ``1/2 tr(G E H E^T)`` when the
    Fisher information is taken apart into a factor H of the input and G of the output (K-FAC,
    Martens and Grosse 2015).

    Attributes:
        own: float32 [N], positive.
        directions: float32 [r, N]; r is 0 where features count each for itself.
    """

    own: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def diagonal(cls, weights: torch.Tensor) -> "RowMetric":
        """Features that count each for itself.

        Args:
            weights: float32 [N].
        """
        return cls(weights, weights.new_zeros(0, len(weights)))

    @classmethod
    def of(cls, moment: torch.Tensor, count: int) -> "RowMetric":
        """The metric of an output's gradients, its diagonal of mean 1.

        Args:
            moment: float32 [N, N], ``E[g g^T]`` in any unit.
            count: directions to keep, those of the largest eigenvalues; what else features have in
                common is not counted.
        """
        diagonal = moment.diagonal()
        mean = float(diagonal.mean())
        if not mean:
            return cls.diagonal(torch.ones_like(diagonal))
        vectors, values = leading_eigenvectors(moment / mean, count)
        directions = (vectors * (_COUNTED * values).sqrt()).T.contiguous()
        own = diagonal / mean - directions.square().sum(0)
        return cls(own.clamp_min(0) + _FLOOR, directions)

    @property
    def weights(self) -> torch.Tensor:
        """The diagonal of G, float32 [N]."""
        return self.own + self.directions.square().sum(0)

    def to(self, device: torch.device) -> "RowMetric":
        return RowMetric(self.own.to(device), self.directions.to(device))

    def part(self, rows: slice) -> "RowMetric":
        """The metric of some features while no error is in the others."""
        return RowMetric(self.own[rows], self.directions[:, rows])

    def rooted(self, error: torch.Tensor) -> torch.Tensor:
        """``C^T E`` with ``G = C C^T``, so that ``tr(G E H E^T)`` is ``tr(C^T E H (C^T E)^T)``.

        Args:
            error: float32 [N, K].

        Returns:
            float32 [N + r, K].
        """
        return torch.cat([error * self.own.sqrt().unsqueeze(1), self.directions @ error])

    def applied(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows times G, float32 [..., N]."""
        return rows * self.own + (rows @ self.directions.T) @ self.directions
