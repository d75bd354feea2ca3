# SPDX-License-Identifier: Apache-2.0
"""The second moment of a linear's input, prepared for quantisation with error feedback."""

from collections.abc import Iterator
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
    diagonal = result.diagonal()  # a view: what follows changes `result`
    mean = float(diagonal.mean()) if scale is None else scale
    diagonal.add_(relative * mean)
    if not bool(diagonal.any()):
        diagonal.fill_(1.0)
    return result


def inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse, ``inv(M) = U^T U``, by way of float64.

    Adds damping in steps when the matrix is not numerically positive definite.

    Args:
        matrix: symmetric float32 [K, K].

    Returns:
        float32 [K, K], upper triangular.

    Raises:
        SvskError: the matrix holds values that are not finite, or cannot be decomposed with any
            damping.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise SvskError(
            "A calibration Hessian holds values that are"
            " not finite: the model's activations overflow."
        )
    # The inverse may be indefinite by rounding although the matrix was not: then more damping.
    for lower in _lower_factors(matrix):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            root: torch.Tensor = upper.float()
            return root
    raise SvskError(
        f"A calibration Hessian of {matrix.shape[0]} channels has no Cholesky decomposition."
    )


def damped_batch(matrices: torch.Tensor, relative: float) -> torch.Tensor:
    """:func:`damped` for each of [A, n, n], relative to its own mean diagonal."""
    mean = matrices.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    added = torch.where(mean == 0, 1.0, relative * mean)
    return matrices + torch.diag_embed(added.expand(matrices.shape[:2]))


def inverse_roots(matrices: torch.Tensor) -> torch.Tensor:
    """:func:`inverse_root` for each of [A, n, n]; what needs more damping is done alone."""
    lower, failed = torch.linalg.cholesky_ex(matrices.double())
    roots, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    result: torch.Tensor = roots.float()
    for index in (
        torch.nonzero((failed != 0) | (failed_again != 0) | ~result.isfinite().all(2).all(1))
        .flatten()
        .tolist()
    ):
        result[index] = inverse_root(matrices[index])
    return result


def lower_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor in float64, with as much further damping as it takes.

    Raises:
        SvskError: no damping is enough.
    """
    for lower in _lower_factors(matrix):
        return lower
    raise SvskError(
        f"A calibration Hessian of {matrix.shape[0]} channels has no Cholesky decomposition."
    )


def _lower_factors(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cholesky factors in float64 under growing damping, where they exist."""
    work = matrix.double()  # float32 products of correlated inputs lose definiteness in float32
    mean = float(work.diagonal().mean())
    for extra in _DAMPING_STEPS:
        shifted = work.clone()
        shifted.diagonal().add_(extra * mean)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            yield lower


@dataclass(frozen=True)
class ColumnOrder:
    """A damped Hessian with what error feedback needs.

    Columns in descending order of their diagonal.

    Attributes:
        hessian: damped, float32 [K, K], original order.
        order: int64 [K], columns as they are processed.
        root: float32 [K, K], :func:`inverse_root` in processing order.
        importance: float32 [K], ``1 / U_jj^2`` in the original order: the error of column j once
            all later columns have made up for it as well as they can.
    """

    hessian: torch.Tensor
    order: torch.Tensor
    root: torch.Tensor
    importance: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> "ColumnOrder":
        """Order and decompose a damped Hessian.

        Raises:
            SvskError: see :func:`inverse_root`.
        """
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        root = inverse_root(hessian[order][:, order])
        importance = torch.empty_like(hessian.diagonal())
        importance[order] = root.diagonal().pow(-2)
        return cls(hessian, order, root, importance)
