# SPDX-License-Identifier: Apache-2.0
"""Inputs whose channels go together, and their second moments."""

import torch

from svsk_offline.calibration import InputStatistics


def inputs(k: int, tokens: int = 600, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a few channels ten times as large, [1, tokens, k]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn(tokens, k, generator=generator)
        @ torch.randn(k, k, generator=generator)
        / k**0.5
    )
    mixed[:, :: k // 4] *= 10
    return mixed.unsqueeze(0)


def statistics(k: int, tokens: int = 600, seed: int = 0) -> InputStatistics:
    found = InputStatistics(k, torch.device("cpu"), full=True)
    found.add(inputs(k, tokens, seed))
    return found
