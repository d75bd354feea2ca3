# SPDX-License-Identifier: Apache-2.0
"""Second moments of a linear's input: sums, weights, 16-bit inputs."""

import pytest
import torch

from svsk_offline.calibration import InputStatistics, input_statistics
from svsk_offline.calibration.input_statistics import multiplied_exactly
from tests.offline.quantizers.correlated import inputs, statistics


def test_statistics_are_those_of_the_inputs() -> None:
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    full = InputStatistics(8, torch.device("cpu"), full=True, first=True)
    diagonal = InputStatistics(8, torch.device("cpu"), full=False)
    for part in x.split([1, 3, 2]):  # chunk by chunk
        full.add(part)
        diagonal.add(part)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(full.hessian, rows.T @ rows / 30)
    torch.testing.assert_close(full.first_hessian, x[:, 0].T @ x[:, 0] / 6)
    torch.testing.assert_close(full.second_moment, rows.square().mean(0))
    torch.testing.assert_close(diagonal.second_moment, rows.square().mean(0))
    with pytest.raises(ValueError, match="full=True"):
        _ = diagonal.hessian
    with pytest.raises(ValueError, match="first=True"):
        _ = diagonal.first_hessian


@pytest.mark.parametrize(
    ("device", "dtype", "exact"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, True),
        ("cpu", torch.float16, False),
        ("cpu", torch.float32, False),
    ],
)
def test_which_products_are_left_to_matrix_units(
    device: str, dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_statistics, "has_bf16_products", lambda: True)
    assert multiplied_exactly(torch.device(device), dtype) == exact
    monkeypatch.setattr(input_statistics, "has_bf16_products", lambda: False)
    assert multiplied_exactly(torch.device(device), dtype) == (exact and device == "cuda")


@pytest.mark.parametrize("k", [5, 64, 200])
def test_bfloat16_inputs_lose_nothing_on_a_cpu(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in bfloat16 would be wrong by a hundredth; and no setting of PyTorch is left changed."""
    monkeypatch.setattr(input_statistics, "has_bf16_products", lambda: True)
    x = inputs(k, 700).flatten(0, -2).bfloat16()
    before = torch.get_float32_matmul_precision()
    found = InputStatistics(k, torch.device("cpu"), full=True)
    for part in x.split(300):
        found.add(part)
    exact = x.double().T @ x.double() / 700
    scale = exact.diagonal().sqrt()
    assert ((found.hessian - exact).abs() / torch.outer(scale, scale)).max() < 1e-5
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_of_16_bit_inputs(
    dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: 16-bit factors reach the product, weighted ones in float32."""
    factors: list[torch.dtype] = []

    def product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        factors.extend((left.dtype, right.dtype))
        total += left.float() @ right.float()

    monkeypatch.setattr(input_statistics, "multiplied_exactly", lambda *_: True)
    monkeypatch.setattr(input_statistics, "_add_wide_product", product)
    x = inputs(24, 60).view(3, 20, 24).to(dtype)
    weights = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) if weighted else None
    found = InputStatistics(24, torch.device("cpu"), full=True, first=True)
    found.add(x, weights)
    rows = x.flatten(0, 1).float()
    counts = torch.ones(60) if weights is None else weights.flatten()
    torch.testing.assert_close(found.hessian, rows.T @ (rows * counts[:, None]) / counts.sum())
    torch.testing.assert_close(found.first_hessian, x[:, 0].float().T @ x[:, 0].float() / 3)
    assert set(factors) == (set() if weighted else {dtype})


def test_nothing_is_taken_in_after_the_hessian_was_read() -> None:
    found = statistics(8)
    assert found.hessian is found.hessian
    with pytest.raises(ValueError, match="read"):
        found.add(inputs(8))
