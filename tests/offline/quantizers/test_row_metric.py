# SPDX-License-Identifier: Apache-2.0
"""The metric of output features against whole matrices."""

import pytest
import torch

from svsk_offline.quantizers.row_metric import RowMetric


def gradients(n: int, tokens: int = 300) -> torch.Tensor:
    """Correlated, and as small as those of a large model: float32 [tokens, n]."""
    generator = torch.Generator().manual_seed(n)
    common = torch.randn(tokens, 3, generator=generator) @ torch.randn(3, n, generator=generator)
    return 1e-9 * (common + 0.3 * torch.randn(tokens, n, generator=generator))


def whole(metric: RowMetric) -> torch.Tensor:
    return torch.diag(metric.own) + metric.directions.T @ metric.directions


@pytest.mark.parametrize("n", [1, 7, 40])
def test_all_directions_are_the_moment_shrunk_to_its_diagonal(n: int) -> None:
    g = gradients(n)
    moment = g.T @ g
    moment = moment / moment.diagonal().mean()
    expected = 0.9 * moment + torch.diag(0.1 * moment.diagonal() + 1e-3)
    torch.testing.assert_close(whole(RowMetric.of(g.T @ g, n + 5)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_fewer_directions_keep_the_diagonal(count: int) -> None:
    g = gradients(40)
    moment = g.T @ g
    metric = RowMetric.of(moment, count)
    assert metric.directions.shape == (count, 40)
    expected = moment.diagonal() / moment.diagonal().mean() + 1e-3
    torch.testing.assert_close(metric.weights, expected)
    torch.testing.assert_close(whole(metric).diagonal(), expected)


def test_what_it_does_is_what_its_matrix_does() -> None:
    metric = RowMetric.of(gradients(24).T @ gradients(24), 6)
    error = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    hessian = torch.cov(torch.randn(10, 50, generator=torch.Generator().manual_seed(1)))
    rooted = metric.rooted(error)
    assert rooted.shape == (30, 10)
    torch.testing.assert_close(
        (rooted @ hessian * rooted).sum(), (whole(metric) @ error @ hessian * error).sum()
    )
    torch.testing.assert_close(metric.applied(error.T), error.T @ whole(metric))
    part = slice(5, 20)
    torch.testing.assert_close(whole(metric.part(part)), whole(metric)[part, part])


def test_an_output_that_nothing_feels_counts_evenly() -> None:
    metric = RowMetric.of(torch.zeros(4, 4), 2)
    assert torch.equal(whole(metric), torch.eye(4))
