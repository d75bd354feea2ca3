# SPDX-License-Identifier: Apache-2.0
"""The formula for the factors of keys."""

import pytest
import torch

from svsk_offline.calibration.channel_maxima import MOMENT
from svsk_offline.planning.fold_pairs import even_factors


def test_factors_of_keys_are_where_scores_lose_least() -> None:
    """Of the product that their docstring has, against factors near them; scale is free."""
    draw = torch.Generator().manual_seed(4)
    powers, energies = torch.rand(2, 12, generator=draw, dtype=torch.float64).exp().pow(8)
    factors = even_factors(powers, energies).double()

    def lost(factors: torch.Tensor) -> float:
        scale = (powers / factors.pow(MOMENT)).sum().pow(2 / MOMENT)
        return float(scale * (energies * factors.square()).sum())

    least = lost(factors)
    assert lost(3 * factors) == pytest.approx(least, rel=1e-5)
    for _ in range(20):
        near = factors * torch.exp(0.1 * torch.randn(12, generator=draw, dtype=torch.float64))
        assert lost(near) > least
    assert lost(powers.pow(1 / MOMENT)) > least


def test_factors_of_keys_that_nothing_reads_or_writes() -> None:
    powers = torch.tensor([16.0, 0.0, 1.0], dtype=torch.float64)
    assert even_factors(powers, torch.zeros(3, dtype=torch.float64)).tolist() == pytest.approx(
        [16 ** (1 / (MOMENT + 2)), 0.0, 1.0]
    )
    found = even_factors(powers, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert found.isfinite().all()
    assert found[1] == 0
