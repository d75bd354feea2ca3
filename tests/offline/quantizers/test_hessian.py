# SPDX-License-Identifier: Apache-2.0
"""The second moment of an input, damped, ordered and factored."""

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.quantizers.alternating import output_error
from svsk_offline.quantizers.hessian import ColumnOrder, damped, inverse_root, inverse_roots
from tests.offline.quantizers.correlated import statistics
from tests.offline.quantizers.test_quantizers import weight


def test_inverse_root_and_damping() -> None:
    hessian = damped(statistics(32).hessian, 0.01)
    root = inverse_root(hessian)
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root @ hessian, torch.eye(32), rtol=1e-3, atol=1e-3)
    singular = torch.ones(16, 16)
    assert torch.isfinite(inverse_root(singular)).all()
    dead = damped(torch.zeros(4, 4), 0.01)
    assert torch.equal(dead, torch.eye(4))


@pytest.mark.parametrize("k", [4, 5, 300, 700])  # below and above the size that is split
def test_root_is_that_of_two_decompositions(k: int) -> None:
    """The factor of the inverse, by one decomposition of the reversed matrix."""
    hessian = statistics(k, 2 * k + 8).hessian
    order = ColumnOrder.of(hessian, 0.01)
    sorted_ = damped(hessian, 0.01)[order.order][:, order.order].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_))
    expected = torch.linalg.cholesky(inverse, upper=True)
    for root in (order.root, inverse_roots(sorted_.float().unsqueeze(0))[0]):
        assert torch.equal(root, root.triu())
        assert float((root - expected).norm() / expected.norm()) < 1e-6


def test_root_of_what_rounding_leaves_without_an_inverse() -> None:
    """Fewer samples than channels: the decomposition may go through by luck, the root may not."""
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    singular = x.T @ x / 6
    for root in (inverse_root(singular), inverse_roots(singular.unsqueeze(0))[0]):
        near = torch.linalg.inv(root.T.double() @ root.double())
        torch.testing.assert_close(near.float(), singular, rtol=0, atol=0.05)


def test_damping_is_lent() -> None:
    hessian = statistics(40).hessian
    before = hessian.clone()
    order = ColumnOrder.of(hessian, 0.1)
    with order.damped() as lent:
        assert torch.equal(lent, damped(before, 0.1))
    assert torch.equal(hessian, before)


def test_factor_of_an_order() -> None:
    rows, hessian = weight(5, 96), statistics(96).hessian
    order = ColumnOrder.of(hessian, 0.01)
    factored = order.factored(rows)
    torch.testing.assert_close(
        float(factored.square().sum()), output_error(rows, damped(hessian, 0.01)), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(order.unfactored(factored), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.full((4, 4), torch.inf), "A calibration Hessian holds values that are not finite"),
        (torch.diag(torch.tensor([1.0, -8.0])), "Hessian of 2 channels has no Cholesky decomp"),
    ],
)
def test_a_hessian_that_is_none_is_refused(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(SvskError, match=message):
        inverse_root(matrix)
