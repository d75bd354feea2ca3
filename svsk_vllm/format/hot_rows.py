# SPDX-License-Identifier: Apache-2.0
"""Rows of 8-bit codes among rows of 4-bit ones: docs/format.md, section 5.

The rows of common tokens of an embedding or output head. Each kind is stored by itself, in the
order of its rows; a list says which rows are hot.
"""

import torch

__all__ = ["hot_rows_problem", "join_rows", "split_rows"]


def hot_rows_problem(rows: torch.Tensor, n: int) -> str | None:
    """What is wrong with the list of hot rows of a weight of ``n`` rows; None if nothing is."""
    wide = rows.long()
    if bool(((wide < 0) | (wide >= n)).any()):
        return f"names rows {int(wide.min())} to {int(wide.max())}, expected 0 to {n - 1}"
    if bool((wide.diff() <= 0).any()):
        return "names rows twice or not in ascending order"
    return None


def split_rows(values: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are not hot and those that are, [N - h, ...] and [h, ...] from [N, ...]."""
    return values[_others(rows, len(values))], values[rows.long()]


def join_rows(others: torch.Tensor, hot: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`split_rows`, in the dtype of ``others``."""
    joined = others.new_empty(len(others) + len(hot), *others.shape[1:])
    joined[_others(rows, len(joined))] = others
    joined[rows.long()] = hot.to(others.dtype)
    return joined


def _others(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Which of ``n`` rows are not listed, bool [n]."""
    others = torch.ones(n, dtype=torch.bool, device=rows.device)
    others[rows.long()] = False
    return others
