# SPDX-License-Identifier: Apache-2.0
"""Rounding one column at a time, each error made up for by the columns still to come (GPTQ, Frantar et al. 2022)."""

from collections.abc import Callable
from typing import Final

import torch

from svsk_offline.quantizers.hessian import ColumnOrder

__all__ = ["BLOCK", "round_with_feedback"]

BLOCK: Final = 128
"""Columns whose updates are applied to the rest of the matrix in one product."""


def round_with_feedback(
    columns: torch.Tensor, order: ColumnOrder, round_column: Callable[[torch.Tensor, int], torch.Tensor]
) -> None:
    """Process all columns of a weight; ``round_column`` keeps what it needs.

    Args:
        columns: float32 [K, N], the transposed weight in the original column order. Not changed.
        order: of the Hessian of the input, K columns.
        round_column: called with the adjusted column, float32 [N], and its original index; returns its rounded value.
    """
    work = columns[order.order]
    root, original = order.root, order.order.tolist()
    size = work.shape[0]
    pivots = order.root.diagonal().tolist()
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        block, local = work[start:stop], root[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column = block[i]
            error = (column - round_column(column, original[start + i])).div_(pivots[start + i])
            errors[i] = error
            if i + 1 < stop - start:
                block[i + 1 :].addr_(local[i, i + 1 :], error, alpha=-1)
        if stop < size:
            work[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1)
