# SPDX-License-Identifier: Apache-2.0
"""Truncated singular value decomposition, and rounding of factors."""

from functools import lru_cache
from typing import Final

import torch

from svsk_kernels.errors import SvskError

__all__ = ["leading_eigenvectors", "leading_right_vectors", "round_rows", "truncated_svd"]

_EXACT_LIMIT: Final = 1536
"""Smaller dimension up to which the decomposition is exact (an eigenproblem of that size).

Its time grows with the third power: beyond, one tile would take longer than all else of a matrix.
"""

_ZERO: Final = 1e-6
"""Singular values below this share of the largest are rounding.

The vectors come from float32 products, so what is smaller has no direction of its own.
"""

_RIDGE: Final = 1e-14
"""Relative to the trace: makes the Gram matrix of dependent columns decomposable in float64."""

_OVERSAMPLING: Final = 16
"""Vectors carried along beyond the rank: the last of the rank converge by the gap behind them."""

_POWER_ITERATIONS: Final = 6
"""Products with the matrix and its transpose; each widens the gaps between singular values."""

_GRAM_ITERATIONS: Final = 8
"""Products with a Gram matrix, in float32, before the Rayleigh-Ritz step."""


def truncated_svd(
    matrix: torch.Tensor, rank: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets.

    Exact (eigenvectors of the smaller Gram matrix, in float64) up to a smaller dimension of 1536,
    beyond it randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4) with a
    seeded start.

    Args:
        matrix: float32 [m, n].
        rank: number of triplets; at most min(m, n) are returned.
        seed: of the random start.

    Returns:
        ``left`` float32 [m, r] and ``right`` float32 [r, n] with orthonormal columns and rows,
        ``values`` float32 [r].
    """
    m, n = matrix.shape
    rank = min(rank, m, n)
    work = matrix.double()
    if min(m, n) > _EXACT_LIMIT:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        start = torch.randn(
            n, min(rank + _OVERSAMPLING, m, n), generator=generator, dtype=torch.float64
        )
        basis = torch.linalg.qr(work @ start.to(work.device))[0]
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(work.T @ basis)[0]
            basis = torch.linalg.qr(work @ basis)[0]
        small_left, values, right = torch.linalg.svd(basis.T @ work, full_matrices=False)
        left = basis @ small_left
    elif m <= n:
        left, values = _leading_eigenvectors(work @ work.T, rank)
        right = _unit_rows(left.T @ work, values)
    else:
        vectors, values = _leading_eigenvectors(work.T @ work, rank)
        right = vectors.T
        left = _unit_rows(vectors.T @ work.T, values).T
    return left[:, :rank].float(), values[:rank].float(), right[:rank].float()


def leading_right_vectors(
    matrices: torch.Tensor, rank: int, exact: bool | None = None
) -> torch.Tensor:
    """Leading right singular vectors of each of several matrices.

    Exact ones are the eigenvectors of the smaller Gram matrix, decomposed in float64, up to a
    smaller dimension of 1536; beyond it they are those of :func:`truncated_svd`. A GPU decomposes
    large symmetric matrices one by one, which for the tiles of a large model takes hours; there
    they come from subspace iteration with a seeded start and a final Rayleigh-Ritz step (Saad 2011,
    algorithm 5.3), products of all matrices together. Those of a flat spectrum hold up to 1% less
    of a matrix than the exact ones, those of a falling one the same.

    Args:
        matrices: float32 [A, m, n].
        rank: number of vectors; at most min(m, n) are returned.
        exact: None for exact ones everywhere but on a GPU.

    Returns:
        float32 [A, r, n]; rows are orthonormal, or zero where a singular value is.
    """
    _, m, n = matrices.shape
    exact = matrices.device.type != "cuda" if exact is None else exact
    if exact and min(m, n) > _EXACT_LIMIT:
        return torch.stack([truncated_svd(matrix, rank)[2] for matrix in matrices])
    rank = min(rank, m, n)
    if m > n:
        return _leading_vectors(matrices.mT @ matrices, rank, exact).mT.contiguous()
    rows = _leading_vectors(matrices @ matrices.mT, rank, exact).mT @ matrices
    norms = rows.norm(dim=2, keepdim=True)
    kept: torch.Tensor = rows / torch.where(norms > _ZERO * norms[:, :1], norms, torch.inf)
    return kept


def leading_eigenvectors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors and eigenvalues of a positive semidefinite matrix.

    Exact up to an order of 1536 on a CPU; elsewhere by the subspace iteration of
    :func:`leading_right_vectors`.

    Args:
        matrix: float32 [n, n].
        rank: number of vectors; at most n are returned.

    Returns:
        ``vectors`` float32 [n, r] with orthonormal columns and ``values`` float32 [r], descending,
        none negative.
    """
    rank = min(rank, len(matrix))
    if not rank:
        return matrix[:, :0], matrix[0, :0]
    exact = matrix.device.type != "cuda" and len(matrix) <= _EXACT_LIMIT
    vectors = _leading_vectors(matrix.unsqueeze(0), rank, exact)[0]
    return vectors, ((matrix @ vectors) * vectors).sum(0).clamp_min(0)


def _leading_vectors(gram: torch.Tensor, rank: int, exact: bool) -> torch.Tensor:
    """Eigenvectors [A, s, rank] of float32 [A, s, s], by descending eigenvalue."""
    count, size, _ = gram.shape
    width = rank + _OVERSAMPLING
    if exact or size <= 2 * width:
        vectors: torch.Tensor = torch.linalg.eigh(gram.double())[1][:, :, -rank:].flip(2).float()
        return vectors
    basis = _start(size, width, gram.device).expand(count, size, width)
    for _ in range(_GRAM_ITERATIONS):
        basis = _orthonormal((gram @ basis).double()).float()
    # Twice: directions that are only rounding come out shorter the first time.
    basis = _orthonormal(_orthonormal(basis.double()))
    projected = basis.mT @ (gram @ basis.float()).double()
    if not bool(projected.isfinite().all()):
        raise SvskError(
            "singular vectors of a residual are not finite."
            " Is the weight or an activation infinite?"
        )
    turned: torch.Tensor = basis @ torch.linalg.eigh(projected + projected.mT)[1][
        :, :, -rank:
    ].flip(2)
    return turned.float()


@lru_cache(maxsize=8)
def _start(size: int, width: int, device: torch.device) -> torch.Tensor:
    """Where subspace iteration begins, the same on every device."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0)).to(device)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Columns of float64 [A, s, w] made orthonormal by their Gram matrix; zeros stay zeros."""
    gram = columns.mT @ columns
    ridge = (
        _RIDGE * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        + torch.finfo(torch.float64).tiny
    )
    lower = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge.expand(gram.shape[:2])))[0]
    result: torch.Tensor = torch.linalg.solve_triangular(lower, columns.mT, upper=False).mT
    return result


def _leading_eigenvectors(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors [m, rank] of a symmetric matrix and the roots of its eigenvalues, descending."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return vectors[:, -rank:].flip(1), eigenvalues[-rank:].flip(0).clamp_min(0).sqrt()


def _unit_rows(rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Rows over their known norms; a zero norm gives a zero row."""
    return rows / torch.where(norms > 0, norms, torch.inf).unsqueeze(1)


def round_rows(rows: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers with one absolute-maximum scale per row.

    Args:
        rows: float32 [..., n].
        num_bits: 8 (values in [-127, 127]) or 4 (values in [-7, 7]).

    Returns:
        int8 [..., n] and float32 scales [...]; a row of zeros has scale 0.
    """
    highest = 2 ** (num_bits - 1) - 1
    scale = rows.abs().amax(-1) / highest
    usable = torch.where(scale > 0, scale, torch.inf).unsqueeze(-1)
    return (rows / usable).round().clamp_(-highest, highest).to(torch.int8), scale
