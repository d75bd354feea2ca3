# SPDX-License-Identifier: Apache-2.0
"""Leading right singular vectors.

How much of a matrix they hold, against the exact decomposition.
"""

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.quantizers import lowrank
from svsk_offline.quantizers.lowrank import leading_eigenvectors, leading_right_vectors


def matrices(count: int, m: int, n: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Random matrices whose column scales fall as a power, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    return torch.randn(count, m, n, generator=generator) @ (
        basis * torch.arange(1, n + 1).float() ** -decay
    )


def energy(matrix: torch.Tensor, rows: torch.Tensor) -> float:
    """Squared norm of the part of ``matrix`` that lies in the span of ``rows``."""
    return float((matrix.double() @ rows.double().T).square().sum())


@pytest.mark.parametrize(("m", "n"), [(256, 320), (320, 256), (300, 300)])
@pytest.mark.parametrize(
    ("decay", "exact", "lost"),
    [(1.0, False, 1e-6), (0.5, False, 1e-4), (0.0, False, 0.02), (0.0, True, 1e-6)],
)
def test_energy_is_that_of_the_exact_vectors(
    m: int, n: int, decay: float, exact: bool, lost: float
) -> None:
    """A flat spectrum is the worst case; there any vectors are nearly as good as the best."""
    rank = 24
    given = matrices(2, m, n, decay)
    found = leading_right_vectors(given, rank, exact)
    assert found.shape == (2, rank, n)
    assert found.dtype == torch.float32
    for matrix, rows in zip(given, found, strict=True):
        torch.testing.assert_close(rows @ rows.T, torch.eye(rank), rtol=0, atol=1e-5)
        best = float(torch.linalg.svdvals(matrix.double())[:rank].square().sum())
        assert best * (1 - lost) < energy(matrix, rows) < best * (1 + 1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [40, 200])
def test_vectors_come_in_the_order_of_their_singular_values(size: int, exact: bool) -> None:
    given = matrices(1, size, size, 1.0)
    found = leading_right_vectors(given, 8, exact)[0]
    norms = (given[0] @ found.T).norm(dim=0)
    expected = torch.linalg.svdvals(given[0])[:8]
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("m", "n"), [(200, 260), (260, 200), (20, 30)])
def test_missing_rank_gives_zeros_or_orthonormal_rows(m: int, n: int, exact: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.randn(m, 5, generator=generator) @ torch.randn(5, n, generator=generator)
    ).unsqueeze(0)
    found = leading_right_vectors(given, 16, exact)[0]
    assert bool(found.isfinite().all())
    norms = found.norm(dim=1)
    assert bool(((norms < 1e-6) | ((norms - 1).abs() < 1e-4)).all())
    assert energy(given[0], found[:5]) == pytest.approx(
        float(given.double().square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("exact", [False, True])
def test_zeros_stay_finite_and_rank_is_limited(exact: bool) -> None:
    assert bool(leading_right_vectors(torch.zeros(2, 200, 210), 16, exact).isfinite().all())
    assert leading_right_vectors(torch.ones(1, 4, 9), 16, exact).shape == (1, 4, 9)


@pytest.mark.parametrize("exact", [False, True])
def test_a_matrix_does_not_depend_on_its_batch(exact: bool) -> None:
    given = matrices(3, 150, 200, 0.7)
    together = leading_right_vectors(given, 12, exact)
    for index in range(3):
        alone = leading_right_vectors(given[index : index + 1], 12, exact)[0]
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("limit", [100, 1000])
def test_eigenvectors_of_a_large_matrix_are_iterated(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "_EXACT_LIMIT", limit)
    given = matrices(1, 400, 260, 0.7)[0]
    gram = given.T @ given
    vectors, values = leading_eigenvectors(gram, 20)
    exact = torch.linalg.eigvalsh(gram.double()).flip(0)[:20].float()
    torch.testing.assert_close(values, exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(20), rtol=0, atol=1e-4)
    assert (gram @ vectors - vectors * values).norm() < 0.02 * gram.norm()


def test_eigenvectors_of_zeros_and_of_none() -> None:
    vectors, values = leading_eigenvectors(torch.zeros(6, 6), 9)
    assert vectors.shape == (6, 6)
    assert not bool(values.any())
    assert leading_eigenvectors(torch.eye(6), 0)[0].shape == (6, 0)


def test_a_residual_that_overflows_is_refused() -> None:
    given = matrices(1, 200, 260, 1.0)
    given[0, 3, 5] = 1e25  # its square is not finite in float32
    with pytest.raises(SvskError, match=r"singular vectors of a residual are not finite. Is the"):
        leading_right_vectors(given, 8, exact=False)
