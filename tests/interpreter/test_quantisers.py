# SPDX-License-Identifier: Apache-2.0
"""The quantiser with its kernel, as on a GPU, against the quantiser with its loop.

The same calls, the same results.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from svsk_offline.quantizers import error_feedback as feedback
from svsk_offline.quantizers.gptq import gptq, initial_scales, polish
from svsk_offline.quantizers.hessian import ColumnOrder, damped
from svsk_offline.quantizers.hessian_sidecar import HessianSidecar, column_tiles, sidecar_weight
from svsk_vllm.format import Codebook, TileGrid
from svsk_vllm.format.group_scales import GroupScales


def hessian(k: int) -> torch.Tensor:
    x = torch.randn(4 * k, k, generator=torch.Generator().manual_seed(k)) @ torch.diag(
        0.2 + torch.rand(k)
    )
    return x.T @ x / len(x)


def weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.02


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Calls a function with the loop, then with the kernel in the loop's place."""

    def call(function: Callable[[], Any]) -> tuple[Any, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(feedback, "_has_op", lambda: False)
            looped = function()
            patch.setattr(feedback, "round_in_a_loop", feedback.round_in_one_launch)
            return looped, function()

    return call


def error(residual: torch.Tensor, moment: torch.Tensor) -> float:
    return float(((residual @ moment) * residual).sum())


@pytest.mark.parametrize(("n", "k", "codebook"), [(20, 192, "int4"), (33, 64, "quad8")])
def test_base_and_polish(both: Any, n: int, k: int, codebook: Codebook) -> None:
    w, order = weight(n, k), ColumnOrder.of(damped(hessian(k), 0.01))
    scale = initial_scales("search", w, order.importance, 32, codebook, GroupScales(torch.bfloat16))
    (levels, values), (found, found_values) = both(lambda: gptq(w, order, scale, codebook))
    assert float((levels == found).float().mean()) > 0.98  # a near tie changes the rest of its row
    assert error(w - found_values, order.hessian) == pytest.approx(
        error(w - values, order.hessian), rel=0.02
    )
    looped, launched = both(lambda: polish(w, order.hessian, levels.clone(), scale, codebook))
    assert float((looped == launched).float().mean()) > 0.98


@pytest.mark.parametrize(
    ("n", "k", "tiles", "rank", "bits"),
    [
        (40, 96, (16, 48), 8, 4),
        (24, 64, (16, 64), 4, 8),
        (1, 32, (16, 32), 4, 8),
        (132, 144, (0, 0), 130, 4),  # U has more columns than a launch takes
    ],
)
def test_sidecar(both: Any, n: int, k: int, tiles: tuple[int, int], rank: int, bits: int) -> None:
    grid, moment = TileGrid(n, k, *tiles), hessian(k)
    sidecar = HessianSidecar(column_tiles(moment, grid, 1e-4), grid, rank, bits)
    residual = weight(n, k)
    looped, launched = both(lambda: sidecar_weight(sidecar.fit(residual), grid))
    assert error(residual - launched, moment) == pytest.approx(
        error(residual - looped, moment), rel=0.02
    )
    assert error(residual - launched, moment) < error(residual, moment)
