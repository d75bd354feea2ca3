# SPDX-License-Identifier: Apache-2.0
"""Rounding by columns, each error made up for by later ones (GPTQ, Frantar et al. 2022)."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch

from svsk_kernels.cpu.build import round_block_obstacle
from svsk_offline.quantizers.hessian import ColumnOrder
from svsk_offline.quantizers.rounding import nearest_integers, nearest_levels
from svsk_vllm.format import CODE_MAX, CODE_MIN, Codebook

__all__ = [
    "BLOCK",
    "Levels",
    "round_block",
    "round_columns",
    "round_in_a_loop",
    "round_in_one_call",
    "round_in_one_launch",
    "round_with_feedback",
]

_LOG: Final = logging.getLogger(__name__)

BLOCK: Final = 128
"""Columns whose updates are applied to the rest of the matrix in one product.

As in the GPTQ paper: the rounding within a block is one column after the other, what it changes
outside is a matrix product wide enough to run at speed.
"""


@dataclass(frozen=True)
class Levels:
    """What a ratio to the scale is rounded to.

    The integers of a range, or the levels of a codebook.

    Attributes:
        low: lowest code.
        high: highest code.
        codebook: what codes stand for; ``int4`` for themselves, whatever the range.
    """

    low: int = CODE_MIN
    high: int = CODE_MAX
    codebook: Codebook = "int4"

    def nearest(self, ratio: torch.Tensor) -> torch.Tensor:
        """Nearest level of each ratio, float32 of the same shape."""
        if self.codebook == "quad8":
            return nearest_levels(ratio, self.codebook)
        return nearest_integers(ratio, self.low, self.high)


def round_block(
    work: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a block one after the other.

    On a GPU in one launch, on a CPU in one call of a C++ op; where that cannot be built in a loop,
    which takes ten times as long and more.

    Args:
        work: float32 [A, B, N]: for A matrices the columns as they are adjusted so far, or for
            coordinate descent the gradient. May be changed.
        coupling: float32 [A, B, B]; row j is what column j's error does to the later ones.
        pivots: float32 [A, B].
        scale: float32 [A, B, N], may be expanded; where it is 0 so is the level.
        levels: what to round to.
        values: float32 [A, B, N], the present values of coordinate descent; None for error
            feedback.

    Returns:
        Levels and errors (for coordinate descent: moves), float32 [A, B, N], as
        :func:`svsk_kernels.gpu.error_feedback.feedback_block` defines them.
    """
    if work.device.type == "cuda":
        rounded = round_in_one_launch
    elif work.device.type == "cpu" and _has_op():
        rounded = round_in_one_call
    else:
        rounded = round_in_a_loop
    return rounded(work, coupling, pivots, scale, levels, values)


@lru_cache(maxsize=1)
def _has_op() -> bool:
    obstacle = round_block_obstacle()
    if obstacle is not None:
        _LOG.warning("Rounding in PyTorch, which is many times slower: %s", obstacle)
    return obstacle is None


def round_in_one_call(
    work: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`round_block` by the C++ op."""
    low, high, quad8 = levels.low, levels.high, levels.codebook == "quad8"
    chosen, errors = torch.ops.svsk.round_block(
        work, coupling, pivots, scale, values, low, high, quad8
    )
    return chosen, errors


def round_in_one_launch(
    work: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`round_block` by the Triton kernel."""
    from svsk_kernels.gpu.error_feedback import feedback_block

    return feedback_block(
        work.contiguous(),
        coupling,
        pivots,
        scale if scale.stride(2) == 1 else scale.contiguous(),
        levels.low,
        levels.high,
        levels.codebook == "quad8",
        None if values is None else values.contiguous(),
    )


def round_in_a_loop(
    work: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`round_block` on any device, a few operations per column."""
    divisor = torch.where(scale == 0, torch.inf, scale)  # which gives a ratio of zero
    chosen, errors = torch.empty_like(work), torch.empty_like(work)
    single = len(work) == 1
    for i in range(work.shape[1]):
        target, pivot = work[:, i], pivots[:, i : i + 1]
        if values is not None:  # a step of Newton's method, exact for a quadratic form
            target = values[:, i] + target / pivot
        chosen[:, i] = levels.nearest(target / divisor[:, i])
        value = chosen[:, i] * scale[:, i]
        errors[:, i] = (target - value).div_(pivot) if values is None else value - values[:, i]
        if single:  # a rank-one update in place, without the temporary of the batched form
            work[0, i + 1 :].addr_(coupling[0, i, i + 1 :], errors[0, i], alpha=-1)
        else:
            work[:, i + 1 :] -= coupling[:, i, i + 1 :].unsqueeze(2) * errors[:, i].unsqueeze(1)
    return chosen, errors


def round_columns(
    work: torch.Tensor, root: torch.Tensor, scale: torch.Tensor, levels: Levels
) -> torch.Tensor:
    """Round the columns of several matrices in their order, a block at a time.

    Args:
        work: float32 [A, B, N], A matrices of B columns. Changed.
        root: float32 [A, B, B], the upper inverse root of each Hessian, in the order of columns.
        scale: float32 [A, B, N], may be expanded.
        levels: what to round to, in units of the scale.

    Returns:
        Levels, float32 [A, B, N].
    """
    size, pivots = work.shape[1], root.diagonal(dim1=1, dim2=2)
    chosen = torch.empty_like(work)
    for start in range(0, size, BLOCK):
        part = slice(start, min(start + BLOCK, size))
        chosen[:, part], errors = round_block(
            work[:, part], root[:, part, part], pivots[:, part], scale[:, part], levels
        )
        if part.stop < size:
            work[:, part.stop :].baddbmm_(root[:, part, part.stop :].mT, errors, alpha=-1)
    return chosen


def round_with_feedback(
    columns: torch.Tensor, order: ColumnOrder, scale: torch.Tensor, levels: Levels
) -> torch.Tensor:
    """Round all columns of a weight.

    Args:
        columns: float32 [K, N], the transposed weight in the original column order. Not changed.
        order: of the Hessian of the input, K columns.
        scale: float32 [G, N], contiguous: of each run of K / G columns in the original order.
        levels: what to round to, in units of the scale.

    Returns:
        Levels, float32 [K, N], in the original column order.
    """
    # Columns of large diagonal first, while most columns are left to make up for their errors.
    work, root = columns[order.order], order.root
    size = work.shape[0]
    pivots = root.diagonal()
    groups = torch.div(order.order, size // scale.shape[0], rounding_mode="floor")
    chosen = torch.empty_like(columns)
    for start in range(0, size, BLOCK):
        part = slice(start, min(start + BLOCK, size))
        rounded, errors = round_block(
            work[part].unsqueeze(0),
            root[part, part].unsqueeze(0),
            pivots[part].unsqueeze(0),
            scale[groups[part]].unsqueeze(0),
            levels,
        )
        chosen[order.order[part]] = rounded[0]
        if part.stop < size:
            work[part.stop :].addmm_(root[part, part.stop :].T, errors[0], alpha=-1)
    return chosen
