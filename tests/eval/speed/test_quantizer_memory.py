# SPDX-License-Identifier: Apache-2.0
"""The count of live memory, and what quantising one linear takes of it."""

import pytest
import torch

from svsk_eval.speed.quantizer_memory import LiveMemory, measure
from svsk_offline.quantizers import hessian


def test_what_lives_is_counted() -> None:
    with LiveMemory() as all_sizes, LiveMemory(least=4000) as large:
        first = torch.zeros(1000)
        view = first[:10]
        del first  # its storage lives on in the view
        second = torch.ones(500)
        assert all_sizes.peak == 6000
        del view
        second = second + 1  # two of them for a moment
        assert all_sizes.peak == 6000
    assert large.peak == 4000


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_at_most_six_matrices(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, two roots and the float64 matrix that becomes the second of them."""
    # In proportion to this width, as they are to a model's.
    monkeypatch.setattr(hessian, "_PANEL", 32)
    monkeypatch.setattr(hessian, "_LEAF", 32)
    peak = measure(384, recipe)
    # One to keep the base's root, one for the Hessian, two for float64, one for what it becomes.
    assert peak.matrices <= 5
    assert peak.tensors <= 8
