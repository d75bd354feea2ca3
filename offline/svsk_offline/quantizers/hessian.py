# SPDX-License-Identifier: Apache-2.0
"""The second moment of a linear's input, prepared for quantisation with error feedback."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from svsk_kernels.errors import SvskError

__all__ = ["ColumnOrder", "damped", "damped_batch", "inverse_root", "inverse_roots", "lower_factor"]

_DAMPING_STEPS: Final = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""Further relative damping to try when the Cholesky decomposition fails.

It begins at 0, so that a matrix which decomposes is left as it is, and ends where the damping is as
large as the mean of the diagonal.
"""

_LEAF: Final = 256
"""Order of the triangular matrices that are inverted by solving for the identity.

That takes three times the operations that are needed, which does not count at this size.
"""

_PANEL: Final = 512
"""Rows or columns of temporary results: a K x K float64 matrix of them is never there."""


def damped(hessian: torch.Tensor, relative: float, scale: float | None = None) -> torch.Tensor:
    """``H + relative * scale * I``; the identity for an input that is always zero.

    A channel that is never used has only the damping on its diagonal. Nothing here has a unit:
    inputs of another scale give the same matrix but for a factor, so channels that are never used
    count the same beside all others.

    Args:
        hessian: float32 [K, K], ``E[x x^T]``.
        relative: relative damping.
        scale: what it is relative to; by default the mean of the diagonal.

    Returns:
        A new float32 [K, K].
    """
    result = hessian.clone()
    result.diagonal().copy_(_damped_diagonal(hessian, relative, scale))
    return result


def _damped_diagonal(hessian: torch.Tensor, relative: float, scale: float | None) -> torch.Tensor:
    """Diagonal of :func:`damped`, float32 [K]; all else is as it was."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) if scale is None else scale
    result = diagonal + relative * mean
    return result if bool(result.any()) else torch.ones_like(result)


def inverse_root(
    matrix: torch.Tensor, order: torch.Tensor | None = None, diagonal: torch.Tensor | None = None
) -> torch.Tensor:
    """Upper factor U of the inverse, ``inv(M) = U^T U``, by way of float64.

    ``U = J L^-1 J`` with J the reversal of rows and ``L L^T = J M J``: one Cholesky decomposition
    and one triangular inverse, both in place, and the condition of the matrix is not squared. Adds
    damping in steps when the matrix is not numerically positive definite.

    Memory: one float64 [K, K], while it is turned into the result a float32 one beside it.

    Args:
        matrix: symmetric float32 [K, K].
        order: int64 [K], rows and columns in the order in which they are taken; None as they are.
        diagonal: float32 [K], stands in for the matrix's own, in the order of the matrix.

    Returns:
        float32 [K, K], upper triangular.

    Raises:
        SvskError: the matrix holds values that are not finite, or cannot be decomposed with any
            damping.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise SvskError(
            "A calibration Hessian holds values that are not finite: the model's activations or"
            " weights overflow."
        )
    given = torch.arange(len(matrix), device=matrix.device) if order is None else order
    lower = _lower_factor(matrix, given.flip(0), diagonal)
    _invert_lower(lower)
    root = lower.to(torch.float32, memory_format=torch.contiguous_format)
    del lower  # before `flip`, which copies
    return root.flip(0, 1)


def damped_batch(matrices: torch.Tensor, relative: float) -> torch.Tensor:
    """:func:`damped` for each of [A, n, n], relative to its own mean diagonal."""
    mean = matrices.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    added = torch.where(mean == 0, 1.0, relative * mean)
    return matrices + torch.diag_embed(added.expand(matrices.shape[:2]))


def inverse_roots(matrices: torch.Tensor) -> torch.Tensor:
    """:func:`inverse_root` for each of [A, n, n]; what needs more damping is done alone."""
    lower, failed = torch.linalg.cholesky_ex(matrices.double().flip(1, 2))
    identity = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    result: torch.Tensor = inverse.flip(1, 2).float()
    doubtful = (failed != 0) | _is_rounding(lower) | ~result.isfinite().all(2).all(1)
    for index in torch.nonzero(doubtful).flatten().tolist():
        result[index] = inverse_root(matrices[index])
    return result


def lower_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor in float64, with as much further damping as it takes.

    Args:
        matrix: symmetric float32 [K, K].

    Raises:
        SvskError: no damping is enough.
    """
    return _lower_factor(matrix, torch.arange(len(matrix), device=matrix.device))


def _lower_factor(
    matrix: torch.Tensor, order: torch.Tensor, diagonal: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`lower_factor` of rows and columns in some order, maybe with another diagonal."""
    kept = (matrix.diagonal() if diagonal is None else diagonal)[order].double()
    count = len(order)
    # Float32 products of correlated inputs lose definiteness in float32.
    work = torch.empty(count, count, dtype=torch.float64, device=matrix.device)
    # In memory LAPACK's columns are the rows here; of a symmetric matrix they are the same.
    lower = work.mT
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    for extra in _DAMPING_STEPS:
        for start in range(0, count, _PANEL):
            rows = order[start : start + _PANEL]
            work[start : start + _PANEL] = matrix[rows][:, order]
        work.diagonal().copy_(kept + extra * kept.mean())
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed) and not bool(_is_rounding(lower)):
            return lower
    raise SvskError(f"A calibration Hessian of {count} channels has no Cholesky decomposition.")


def _is_rounding(lower: torch.Tensor) -> torch.Tensor:
    """Whether a pivot of a float64 Cholesky factor [..., K, K] is what rounding left of a zero.

    Such a factor stands for a matrix without an inverse.
    """
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    least = torch.finfo(torch.float64).eps ** 0.5 * pivots.square().mean(-1).sqrt()
    rounding: torch.Tensor = pivots.amin(-1) <= least
    return rounding


def _invert_lower(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves.

    The inverse of ``[[A, 0], [B, C]]`` is ``[[A^-1, 0], [-C^-1 B A^-1, C^-1]]``.

    Args:
        lower: float64 [K, K], zeros above the diagonal.
    """
    count = len(lower)
    if count <= _LEAF:
        identity = torch.eye(count, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = count // 2
    upper_left, below, lower_right = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower(upper_left)
    for columns in below.split(_PANEL, 1):
        columns.copy_(torch.linalg.solve_triangular(lower_right, columns, upper=False))
    for rows in below.split(_PANEL, 0):
        rows.copy_((rows @ upper_left).neg_())
    _invert_lower(lower_right)


@dataclass(frozen=True)
class ColumnOrder:
    """A Hessian with what error feedback needs.

    Columns in descending order of their diagonal.

    Attributes:
        hessian: float32 [K, K], original order; not copied, so that several orders (of other
            dampings) and the statistics share one matrix.
        diagonal: float32 [K], the damped diagonal.
        order: int64 [K], columns as they are processed.
        root: float32 [K, K], :func:`inverse_root` of the damped matrix in processing order.
        importance: float32 [K], ``1 / U_jj^2`` in the original order: the error of column j once
            all later columns have made up for it as well as they can.
    """

    hessian: torch.Tensor
    diagonal: torch.Tensor
    order: torch.Tensor
    root: torch.Tensor
    importance: torch.Tensor

    @classmethod
    def of(
        cls, hessian: torch.Tensor, damping: float = 0.0, scale: float | None = None
    ) -> "ColumnOrder":
        """Order and decompose a Hessian.

        Args:
            hessian: float32 [K, K].
            damping: relative, as in :func:`damped`.
            scale: what it is relative to; by default the mean of the diagonal.

        Raises:
            SvskError: see :func:`inverse_root`.
        """
        diagonal = _damped_diagonal(hessian, damping, scale)
        order = torch.argsort(diagonal, descending=True, stable=True)
        root = inverse_root(hessian, order, diagonal)
        importance = torch.empty_like(diagonal)
        importance[order] = root.diagonal().pow(-2)
        return cls(hessian, diagonal, order, root, importance)

    @contextmanager
    def damped(self) -> Iterator[torch.Tensor]:
        """The damped Hessian, float32 [K, K], while the context lasts.

        It is :attr:`hessian` itself under its damped diagonal, which saves a second K x K matrix;
        whoever else holds that matrix must not look at it meanwhile.
        """
        shared = self.hessian.diagonal()
        before = shared.clone()
        shared.copy_(self.diagonal)
        try:
            yield self.hessian
        finally:
            shared.copy_(before)

    def factored(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows times a factor F of the damped Hessian, ``H = F F^T``: the norm is the error.

        F is ``P^T U^-1``, P the processing order; :meth:`unfactored` undoes it.

        Args:
            rows: float32 [..., K], original order of columns.

        Returns:
            float32 [..., K]; its columns have no order that means anything.
        """
        flat = rows.flatten(0, -2)[:, self.order]
        solved: torch.Tensor = torch.linalg.solve_triangular(
            self.root, flat, upper=True, left=False
        )
        return solved.view(rows.shape)

    def unfactored(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows times ``F^-1``, float32 [n, K] in the original order of columns."""
        result = torch.empty_like(rows)
        result[:, self.order] = rows @ self.root
        return result
