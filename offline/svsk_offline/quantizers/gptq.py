# SPDX-License-Identifier: Apache-2.0
"""The 4-bit base: searched scales, error feedback, and polish by coordinate descent."""

from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

import torch

from svsk_offline.quantizers.error_feedback import BLOCK, Levels, round_block, round_with_feedback
from svsk_offline.quantizers.hessian import ColumnOrder
from svsk_offline.quantizers.rounding import absmax_scale, nearest_levels
from svsk_vllm.format import Codebook, codebook_levels
from svsk_vllm.format.group_scales import GroupScales

__all__ = [
    "DEFAULT_CANDIDATES",
    "gptq",
    "initial_scales",
    "level_values",
    "polish",
    "refit_scales",
    "search_scales",
]

DEFAULT_CANDIDATES: Final = tuple(1.12 - 0.045 * step for step in range(12))
"""Factors on the scale that puts the largest magnitude on the codebook's widest level.

Below 1 the largest weights are clipped for finer steps of all others. Above 1 no weight is clipped,
and the one of largest magnitude falls between two levels.
"""

_NEARBY: Final = (1.0, 0.95, 1.05, 0.9, 1.1)
"""Factors on the scales of a weight that differed little.

What a sidecar takes off moves a group's best scale by some hundredths; those of its own codes are
found by the refit that follows each factor.
"""

_CHUNK: Final = (1 << 17, 1 << 25)
"""Weights searched at a time: half a MiB of each temporary result, of which a CPU's cache holds
several; on a GPU, so many that launches do not count."""

_SYSTEMS: Final = (1 << 24, 1 << 26)
"""Elements of the float64 systems solved at a time to refit scales: 128 MiB, on a GPU 512."""


def _at_a_time(limits: tuple[int, int], tensor: torch.Tensor) -> int:
    """The limit of the tensor's device: the first, or on a GPU the second."""
    return limits[tensor.device.type == "cuda"]


def initial_scales(
    method: Literal["search", "absmax"],
    weight: torch.Tensor,
    importance: torch.Tensor,
    group_size: int,
    codebook: Codebook,
    stored: GroupScales,
    near: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales of :func:`search_scales` (arguments as there), or those of plain rounding."""
    if method == "search":
        return search_scales(weight, importance, group_size, codebook, stored, near=near)
    scale = absmax_scale(weight.view(weight.shape[0], -1, group_size), codebook)
    return stored.round(scale, stored.row_scale(scale)).to(stored.dtype)


def search_scales(
    weight: torch.Tensor,
    importance: torch.Tensor,
    group_size: int,
    codebook: Codebook,
    stored: GroupScales,
    candidates: Sequence[float] = DEFAULT_CANDIDATES,
    near: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per group, the scale with the least importance-weighted error of plain rounding.

    Each candidate of each sign (the codebooks reach further down than up) is refitted by least
    squares to the codes it gives, ``s = sum p w c / sum p c^2``, and rounded to what can be stored
    before its error is taken. In two levels a first search, free of rounding, gives the row's
    scale; the second is among its multiples.

    Args:
        weight: float32 [N, K].
        importance: float32 [K], positive.
        group_size: weights per scale.
        codebook: the 16 levels.
        stored: how scales are stored.
        candidates: positive factors.
        near: scales [N, K / group_size] found for a weight that differs little; the search is then
            around them alone, in a quarter of the time.

    Returns:
        Scales [N, K / group_size] of the stored dtype.
    """
    rows = max(1, _at_a_time(_CHUNK, weight) // weight.shape[1])
    starts = [None] * -(-len(weight) // rows) if near is None else near.float().split(rows)
    parts = [
        _search(part, importance, group_size, codebook, stored, candidates, start)
        for part, start in zip(weight.split(rows), starts, strict=True)
    ]
    return torch.cat(parts)


def _search(
    weight: torch.Tensor,
    importance: torch.Tensor,
    group_size: int,
    codebook: Codebook,
    stored: GroupScales,
    candidates: Sequence[float],
    near: torch.Tensor | None,
) -> torch.Tensor:
    groups = weight.view(weight.shape[0], -1, group_size)
    weights = importance.view(-1, group_size)
    # The error is expanded, sum p (w - s c)^2 = sum p w^2 - 2 s sum p w c + s^2 sum p c^2, so that
    # each candidate passes over the weights once for its codes and once for its sums.
    weighted = groups * weights
    energy = (weighted * groups).sum(-1)
    full = groups.abs().amax(-1) / float(codebook_levels(codebook).abs().max())
    factors = [sign * candidate for sign in (1, -1) for candidate in candidates]
    if near is not None:  # zero is what a group of zeros had
        full, factors = torch.where(near == 0, full, near), list(_NEARBY)
    fits: list[_Fit] = []
    for factor in factors:
        start = full * factor
        inverse = torch.where(start == 0, 0.0, 1 / start)
        levels = nearest_levels(groups * inverse.unsqueeze(-1), codebook)
        cross = (weighted * levels).sum(-1)
        square = (levels.square_() * weights).sum(-1)
        fits.append((torch.where(square > 0, cross / square, start), cross, square))
    free = _best_of(fits, energy, lambda scale: scale)
    row_scale = stored.row_scale(free)
    return _best_of(fits, energy, lambda scale: stored.round(scale, row_scale)).to(stored.dtype)


_Fit: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Scale refitted to a candidate's codes, ``sum p w c`` and ``sum p c^2``; float32 [N, G] each."""


def _best_of(
    fits: Sequence[_Fit], energy: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Of each group's rounded scales that of least error, float32 [N, G]."""
    best_error = torch.full_like(energy, torch.inf)
    best = torch.zeros_like(energy)
    for free, cross, square in fits:
        # Rounded before its error is taken: the stored scale is the one that is used.
        scale = rounded(free)
        error = energy - 2 * scale * cross + scale.square() * square
        better = error < best_error  # strictly: of equal ones the first, whose sign is positive
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best


def gptq(
    weight: torch.Tensor, order: ColumnOrder, scale: torch.Tensor, codebook: Codebook
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes under fixed scales, with error feedback in the order of the Hessian's diagonal.

    Args:
        weight: float32 [N, K].
        order: of the damped Hessian.
        scale: [N, K / g], stored dtype.
        codebook: the 16 levels.

    Returns:
        float32 levels [N, K] (``c(q)``, not codes) and float32 values [N, K].
    """
    by_group = scale.float().T.contiguous()  # [G, N]
    levels = round_with_feedback(weight.T.contiguous(), order, by_group, Levels(codebook=codebook))
    levels = levels.T.contiguous()
    return levels, level_values(levels, scale)


def level_values(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights that levels stand for: float32 [N, K] times the scale [N, K / g] of its group."""
    n, k = levels.shape
    return (levels.view(n, scale.shape[1], -1) * scale.float().unsqueeze(-1)).view(n, k)


def polish(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    codebook: Codebook,
    sweeps: int = 1,
) -> torch.Tensor:
    """Coordinate descent over the codes: each in turn moves to its best level, all others fixed.

    Minimises ``tr(R H R^T)`` with ``R = weight - levels * scale``; no move raises it.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], damped.
        levels: float32 [N, K], changed in place.
        scale: [N, K / g].
        codebook: the 16 levels.
        sweeps: passes over all columns.

    Returns:
        ``levels``.
    """
    k = weight.shape[1]
    by_group = scale.float().T.contiguous()
    steps = by_group.repeat_interleave(k // by_group.shape[0], 0)  # [K, N]
    current = levels.T.contiguous()
    values = current * steps
    gradient = hessian @ (weight.T - values)  # [K, N], half of it and of opposite sign
    curvature = hessian.diagonal()
    # A block of columns at a time: within it each move changes the gradient of the columns after
    # it, all other columns get the block's moves in one product.
    for _ in range(sweeps):
        for start in range(0, k, BLOCK):
            part = slice(start, min(start + BLOCK, k))
            chosen, moves = round_block(
                gradient[part].unsqueeze(0).clone(),
                hessian[part, part].unsqueeze(0),
                curvature[part].unsqueeze(0),
                steps[part].unsqueeze(0),
                Levels(codebook=codebook),
                values[part].unsqueeze(0),
            )
            current[part], values[part] = chosen[0], chosen[0] * steps[part]
            gradient.addmm_(hessian[:, part], moves[0], alpha=-1)
    levels.copy_(current.T)
    return levels


def refit_scales(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    stored: GroupScales,
) -> torch.Tensor:
    """All scales of a row fitted together to its fixed codes: least squares under the Hessian.

    Solves ``A s = b`` per row with ``A_gh = q_g H_gh q_h^T`` and ``b_g = (w H)_g q_g^T`` in
    float64, rounds to what can be stored, and keeps a row's old scales unless the new ones lower
    its ``r H r^T``.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], damped.
        levels: float32 [N, K].
        scale: [N, K / g], stored dtype.
        stored: how scales are stored.

    Returns:
        Scales of the same shape and dtype.
    """
    rows = max(1, _at_a_time(_SYSTEMS, weight) // scale.shape[1] ** 2)
    weighted = weight @ hessian
    split = (weighted.split(rows), levels.split(rows), scale.split(rows))
    parts = [_refit(w, hessian, q, s, stored) for w, q, s in zip(*split, strict=True)]
    return torch.cat(parts)


def _refit(
    weighted: torch.Tensor,
    hessian: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    stored: GroupScales,
) -> torch.Tensor:
    """New scales of some rows; ``weighted`` is ``W H`` of these rows."""
    n, groups = scale.shape
    size = levels.shape[1] // groups
    system = torch.empty(n, groups, groups, dtype=torch.float64, device=levels.device)
    for g in range(groups):
        # It is symmetric: row g from its diagonal on, and column g with it.
        columns, rest = slice(g * size, (g + 1) * size), slice(g * size, None)
        products = (levels[:, columns] @ hessian[columns, rest]) * levels[:, rest]
        system[:, g, g:] = products.view(n, groups - g, size).sum(-1)
        # Without the diagonal: where there is one row, torch refuses to copy it onto itself.
        system[:, g + 1 :, g] = system[:, g, g + 1 :]
    right = (weighted * levels).view(n, groups, size).sum(-1).double()
    old = scale.double()
    # A group whose codes are all 0 has a row of zeros, which leaves its scale open. A pull towards
    # the old scales, far below the float32 rounding of the system, settles it; `tiny` does where
    # the whole system is zero.
    diagonal = system.diagonal(dim1=1, dim2=2)
    damping = 1e-9 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float64).tiny
    damped = system + torch.diag_embed(damping.expand(n, groups))
    solved, failed = torch.linalg.solve_ex(damped, right + damping * old)
    # As stored, for rounding may undo the gain.
    single = solved.float()
    new = stored.round(single, stored.row_scale(single)).double()

    def objective(candidate: torch.Tensor) -> torch.Tensor:
        return (
            (system @ candidate.unsqueeze(-1)).squeeze(-1) * candidate - 2 * right * candidate
        ).sum(1)

    better = (failed == 0) & new.isfinite().all(1) & (objective(new) < objective(old))
    return torch.where(better.unsqueeze(1), new, old).to(scale.dtype)
