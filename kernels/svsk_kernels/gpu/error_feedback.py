# SPDX-License-Identifier: Apache-2.0
"""Rounding with error feedback inside a block of columns: the quantiser's inner loop on a GPU.

Column by column, a few small operations each, a model of 8 billion parameters takes millions of
launches; here a program keeps the errors of its rows in registers and goes through all columns of a
block. A column is made up for when its turn comes (``w_i - sum_j<i error_j c_ji``) and not after
each rounding, which needs the errors only.

The quantiser's matrices                    In the launch (feedback_block)
weight     [N, K], a row per output         work, scale, values, levels, errors  [batch, columns, N]
  columns of a block lie K apart              a column's rows lie side by side: whole transactions
coupling   [columns, columns], row j:       coupling  transposed, row i: what column i takes over,
  what column j does to the later ones        so that a turn of the loop reads one row
"""

from typing import Final

import torch
import triton
import triton.language as tl

__all__ = [
    "MAX_COLUMNS",
    "ROWS",
    "WARPS",
    "check_block",
    "feedback_block",
    "feedback_kernel",
    "nearest_level",
]

MAX_COLUMNS: Final = 128
"""Columns of a block: what a program's registers hold errors for."""

ROWS: Final = 32
"""Rows of a program, a single warp: each lane keeps one row's errors, and nothing is exchanged."""

WARPS: Final = 1
_MAX_BATCH: Final = 65535  # of a grid's second dimension
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a small float32, it leaves no bits for a fraction, halves to even."""


@triton.jit
def nearest_level(ratio, LOW: tl.constexpr, HIGH: tl.constexpr, QUAD8: tl.constexpr):
    """Level nearest to a ratio.

    Halves go to the even code. See ``svsk_offline.quantizers.rounding``.
    """
    if QUAD8:
        # Ratios beyond the largest level, 16, end at the last code anyway; 64 is finite.
        size = tl.minimum(tl.abs(ratio), 64.0)
        # The boundary between the levels of q and q + 1 goes to q + 1/2.
        code = tl.sqrt_rn(size * 8.0 + 15.75) - 4.0
        ratio = tl.where(ratio < 0, -code, code)
    # Within these bounds the sum below keeps the integer part exactly.
    bounded = tl.minimum(tl.maximum(ratio, LOW), HIGH)
    code = (bounded + _MAGIC) - _MAGIC
    level = code
    if QUAD8:
        level = code * (8.0 + tl.abs(code)) * 0.125
    return tl.where(ratio == ratio, level, ratio)  # NaN stays NaN


@triton.jit(do_not_specialize=["count"])
def feedback_kernel(
    # tensors, a batch of matrices
    work,  # float32 [batch, count, n]: what each column is to be, before the errors of this block
    coupling,  # float32 [batch, count, count]: how much of column j's error column i takes over
    pivots,  # float32 [batch, count]
    scale,  # float32 [batch, count, n] by strides: step of the levels
    values,  # float32 [batch, count, n]: values to descend from; not read without DESCENT
    levels,  # float32 [batch, count, n]: result
    errors,  # float32 [batch, count, n]: result
    # sizes
    n,  # rows of a matrix
    count,  # columns of the block, at most COLUMNS
    scale_batch,  # elements between matrices in scale, 0 where they share it
    scale_column,  # elements between columns in scale, 0 where they share it
    # codebook
    LOW: tl.constexpr,  # smallest code
    HIGH: tl.constexpr,  # largest code
    QUAD8: tl.constexpr,  # codebook quad8 instead of integers
    # what is computed
    DESCENT: tl.constexpr,  # coordinate descent from values instead of error feedback
    # blocks
    COLUMNS: tl.constexpr,  # errors a program keeps per row, a power of two
    BLOCK_N: tl.constexpr,  # rows per program
):
    """BLOCK_N rows of one matrix of a batch, see :func:`feedback_block`.

    Grid (ceil(n / BLOCK_N), batch).
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < n
    batch = tl.program_id(1).to(tl.int64)
    earlier = tl.arange(0, COLUMNS)
    batch_start = batch * count * n + rows
    block_errors = tl.zeros((COLUMNS, BLOCK_N), tl.float32)
    for i in range(count):
        # what the errors of the columns before leave of this one
        coupling_at = coupling + (batch * count + i) * count + earlier
        coupling_row = tl.load(coupling_at, mask=earlier < i, other=0.0)
        at = batch_start + i * n
        carried = tl.sum(block_errors * coupling_row[:, None], axis=0)
        target = tl.load(work + at, mask=mask_n, other=0.0) - carried
        # what the rounding of this column needs: pivot, scale, and where it is now
        pivot = tl.load(pivots + batch * count + i)
        scale_row = scale + batch * scale_batch + i * scale_column
        step = tl.load(scale_row + rows, mask=mask_n, other=0.0)
        previous = tl.zeros((BLOCK_N,), tl.float32)
        if DESCENT:
            previous = tl.load(values + at, mask=mask_n, other=0.0)
            target = previous + tl.div_rn(target, pivot + tl.zeros((BLOCK_N,), tl.float32))
        # round to the nearest level; a group of zeros has a step of zero
        usable = step != 0
        ratio = tl.where(usable, tl.div_rn(target, tl.where(usable, step, 1.0)), 0.0)
        level = nearest_level(ratio, LOW, HIGH, QUAD8)
        value = level * step
        # the error that later columns make up for
        if DESCENT:
            error = value - previous
        else:
            error = tl.div_rn(target - value, pivot + tl.zeros((BLOCK_N,), tl.float32))
        # to memory, and to the registers of later turns
        tl.store(levels + at, level, mask=mask_n)
        tl.store(errors + at, error, mask=mask_n)
        block_errors = tl.where(earlier[:, None] == i, error[None, :], block_errors)


def feedback_block(
    work: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    low: int,
    high: int,
    quad8: bool,
    values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block's columns in turn, each to what the errors of those before it leave.

    With ``w_i = work_i - sum_j<i errors_j coupling_ji`` and ``round`` to the nearest level times
    its scale: error feedback (``values`` None) rounds ``w_i`` and leaves the error ``(w_i -
    rounded) / pivot_i``; coordinate descent rounds ``values_i + w_i / pivot_i`` and leaves the move
    ``rounded - values_i``.

    Args:
        work: float32 [A, B, N], contiguous: A matrices with B columns and N rows, B at most 128.
        coupling: float32 [A, B, B]; row j holds what column j's error does to the later ones.
        pivots: float32 [A, B].
        scale: float32 [A, B, N], its last axis contiguous (or expanded where A or B repeat); where
            it is 0, so is the level.
        low: lowest code.
        high: highest code.
        quad8: codes stand for the levels of ``quad8`` instead of themselves.
        values: float32 [A, B, N], contiguous, the present values of coordinate descent.

    Returns:
        ``levels`` (values, not codes) and ``errors``, both float32 [A, B, N].

    Raises:
        ValueError: more columns than a block holds, or another shape, dtype or layout.
    """
    check_block(work, coupling, pivots, scale, values)
    batch, count, n = work.shape
    levels, errors = torch.empty_like(work), torch.empty_like(work)
    if n == 0 or batch == 0:
        return levels, errors
    columns = max(16, triton.next_power_of_2(count))
    options = {} if triton.knobs.runtime.interpret else {"num_warps": WARPS}
    with torch.cuda.device_of(work):
        feedback_kernel[(triton.cdiv(n, ROWS), batch)](
            work,
            coupling.mT.contiguous(),
            pivots.contiguous(),
            scale,
            work if values is None else values,
            levels,
            errors,
            n,
            count,
            scale.stride(0),
            scale.stride(1),
            LOW=low,
            HIGH=high,
            QUAD8=quad8,
            DESCENT=values is not None,
            COLUMNS=columns,
            BLOCK_N=ROWS,
            **options,
        )
    return levels, errors


def check_block(
    work: torch.Tensor,
    coupling: torch.Tensor,
    pivots: torch.Tensor,
    scale: torch.Tensor,
    values: torch.Tensor | None = None,
) -> None:
    """Raise ValueError unless :func:`feedback_block` takes these tensors."""
    batch, count, n = work.shape
    shapes = {
        "work": (work, (batch, count, n)),
        "coupling": (coupling, (batch, count, count)),
        "pivots": (pivots, (batch, count)),
        "scale": (scale, (batch, count, n)),
    }
    if values is not None:
        shapes["values"] = (values, (batch, count, n))
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"{name}: expected float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}."
            )
    if batch > _MAX_BATCH:
        raise ValueError(f"work: {batch} matrices, expected at most {_MAX_BATCH}.")
    if not 0 < count <= MAX_COLUMNS:
        raise ValueError(
            f"work: {count} columns, expected 1 to {MAX_COLUMNS}: split the matrix into blocks."
        )
    if (
        not work.is_contiguous()
        or (values is not None and not values.is_contiguous())
        or scale.stride(2) != 1
    ):
        raise ValueError("work and values must be contiguous, and scale along its last axis.")
