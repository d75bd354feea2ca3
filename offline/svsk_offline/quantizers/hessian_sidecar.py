# SPDX-License-Identifier: Apache-2.0
"""The sidecar fitted to the output's error: a truncated SVD per tile under the full Hessian."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from svsk_offline.quantizers.diagonal_sidecar import Sidecar
from svsk_offline.quantizers.error_feedback import Levels, round_columns, round_with_feedback
from svsk_offline.quantizers.hessian import (
    ColumnOrder,
    damped,
    damped_batch,
    inverse_roots,
    lower_factor,
)
from svsk_offline.quantizers.lowrank import leading_right_vectors
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_vllm.format import TileGrid

__all__ = ["ColumnTile", "HessianSidecar", "column_tiles", "sidecar_weight"]

_CLIPS: Final = (1.0, 0.9, 0.8, 0.7, 0.62, 0.55, 0.48, 0.42, 0.36)
"""Fractions of the absolute maximum tried as the range of 4-bit factors."""

_RIDGE: Final = 1e-6
"""Relative ridge of the r x r systems.

Their entries are float32 products, whose rounding (about 1e-7 of the largest) must not decide.
"""

_GAIN_RIDGE: Final = 1e-9
"""Relative ridge of the systems for the gains.

Smaller, since they are solved in float64 and only kept where they lower the error.
"""


@dataclass(frozen=True)
class ColumnTile:
    """What one column tile needs of the Hessian, the same for all rows and all rounds."""

    columns: slice
    order: ColumnOrder
    # inv(H_cc) H_c, float32 [w, K]; None when the tile is the whole dimension.
    coupling: torch.Tensor | None


def column_tiles(hessian: torch.Tensor, grid: TileGrid, ridge: float) -> list[ColumnTile]:
    """Decompose the Hessian of each column tile.

    Args:
        hessian: float32 [K, K], not damped.
        grid: tiles; only the columns matter.
        ridge: relative ridge on each tile's own block.
    """
    tiles = []
    for b in range(grid.num_col_tiles):
        columns = grid.col_slice(b)
        block = hessian[columns, columns]
        coupling = None
        if len(block) < grid.k:
            lower = lower_factor(damped(block, ridge))
            coupling = torch.cholesky_solve(hessian[columns].double(), lower).float()
        tiles.append(ColumnTile(columns, ColumnOrder.of(block, ridge), coupling))
    return tiles


class HessianSidecar:
    """Fits sidecars for one linear.

    Args:
        tiles: result of :func:`column_tiles` for the same grid columns.
        grid: tiles of the weight.
        rank: rank per tile.
        num_bits: 8 or 4, bits of a factor.
        metric: how much errors of output features count; None is 1 each.
    """

    def __init__(
        self,
        tiles: list[ColumnTile],
        grid: TileGrid,
        rank: int,
        num_bits: int,
        metric: RowMetric | None = None,
    ) -> None:
        self.tiles, self.grid, self.rank, self.num_bits = tiles, grid, rank, num_bits
        # Of each tile's rows; those that fill up the last tile do not count.
        self.metrics: list[RowMetric] | None = None
        self.weights: torch.Tensor | None = None  # their diagonals [A, rows]
        if metric is not None:
            own = self._by_tile(metric.own.unsqueeze(1)).squeeze(2)
            directions = self._by_tile(metric.directions.T).mT
            self.metrics = [RowMetric(*tile) for tile in zip(own, directions, strict=True)]
            self.weights = torch.stack([tile.weights for tile in self.metrics])

    def fit(self, residual: torch.Tensor, sweeps: int = 3) -> Sidecar:
        """Minimise ``tr(G E H E^T)`` with ``E = R - U diag(gain) V`` over rounded factors.

        R is the residual, G the metric of the rows. In the rounding of U only the diagonal of G
        counts: for given V the best U without rounding is the same under every G.

        All rows of tiles are fitted at once. Column tiles are fitted in turn: in the first sweep to
        their own columns of the residual, then to what all others leave, as far as a tile can make
        up for it through the off-diagonal blocks of the Hessian. Making up for others in the first
        sweep, before they are fitted, ends at several times the error. V is rounded with error
        feedback under H, U is refitted to the rounded V and rounded with feedback under ``V H
        V^T``, and the gains are refitted to both.

        Args:
            residual: float32 [N, K], weight minus base.
            sweeps: passes over the column tiles; one is enough when there is only one.
        """
        grid, device = self.grid, residual.device
        # [A, rows, K], minus the product of every fitted tile.
        left = self._by_tile(residual).clone()
        count, rows, _ = left.shape
        u = torch.zeros(count, rows, grid.num_col_tiles, self.rank, dtype=torch.int8, device=device)
        v = torch.zeros(count, self.rank, grid.k, dtype=torch.int8, device=device)
        gain = torch.zeros(count, grid.num_col_tiles, self.rank, device=device)
        for sweep in range(sweeps if len(self.tiles) > 1 else 1):
            for b, tile in enumerate(self.tiles):
                part = left[:, :, tile.columns]  # a view
                if sweep:  # what this tile took off in the last sweep is put back
                    part += _product(u[:, :, b], v[:, :, tile.columns], gain[:, b])
                target = part if sweep == 0 or tile.coupling is None else left @ tile.coupling.T
                codes_u, codes_v, scale = self._fit_tiles(target.contiguous(), tile)
                rank = scale.shape[1]  # less than self.rank in a tile too small for it
                u[:, :, b, :rank] = codes_u
                v[:, :rank, tile.columns] = codes_v
                gain[:, b, :rank] = scale
                part -= _product(u[:, :, b], v[:, :, tile.columns], gain[:, b])
        return Sidecar(u.flatten(0, 1)[: grid.n], v, gain)

    def _by_tile(self, matrix: torch.Tensor) -> torch.Tensor:
        """Rows of tiles of [N, K] as [A, rows, K]; the last one is filled up with zeros."""
        count, rows = self.grid.num_row_tiles, min(self.grid.tile_rows, self.grid.n)
        missing = count * rows - matrix.shape[0]
        return nn.functional.pad(matrix, (0, 0, 0, missing)).view(count, rows, -1)

    def _fit_tiles(
        self, target: torch.Tensor, tile: ColumnTile
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rounded U [A, rows, f], V [A, f, w], gains [A, f] of [A, rows, w], f <= rank."""
        weighted = target
        if self.metrics is not None:
            pairs = zip(self.metrics, target, strict=True)
            weighted = torch.stack([metric.rooted(rows) for metric, rows in pairs])
        # With H = F F^T and G = C C^T the error is the squared norm of C^T E F: the best V is
        # Q^T F^-1, Q^T the leading right vectors of C^T T F.
        right = leading_right_vectors(tile.order.factored(weighted), self.rank)
        count, ranks, width = right.shape
        vectors = tile.order.unfactored(right.flatten(0, 1))
        # V is rounded first, and U fitted to the rounded V: so U makes up for V's rounding.
        v_codes, v_scale = self._round_v(vectors, tile.order)
        # Products of the integers, scaled afterwards: the gains below need both.
        with tile.order.damped() as hessian:
            codes_h = (v_codes @ hessian).view(count, ranks, width)
        v_codes, v_scale = v_codes.view(count, ranks, width), v_scale.view(count, ranks)
        vh = codes_h * v_scale.unsqueeze(2)
        small = damped_batch(vh @ (v_codes * v_scale.unsqueeze(2)).mT, _RIDGE)
        right_side = vh @ target.mT
        free = torch.linalg.solve(small.double(), right_side.double()).float()  # U^T [A, f, rows]
        u_codes, u_scale = self._round_u(free, small)
        gains = self._refit_gains(
            right_side / v_scale.unsqueeze(2), u_codes, codes_h @ v_codes.mT, u_scale * v_scale
        )
        return u_codes.mT.to(torch.int8), v_codes.to(torch.int8), gains

    def _round_v(self, rows: torch.Tensor, order: ColumnOrder) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers (as float32) of V [n, w] and scales [n], with feedback along the columns."""
        scale = _row_scales(rows, order.importance, self.num_bits)
        codes = round_with_feedback(rows.T.contiguous(), order, scale.unsqueeze(0), self._levels)
        return codes.T.contiguous(), scale

    def _round_u(
        self, rows: torch.Tensor, small: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers of U^T [A, f, rows], scales [A, f]; ``small`` is ``V H V^T`` [A, f, f]."""
        weights = torch.ones_like(rows[:, 0]) if self.weights is None else self.weights
        each = weights.unsqueeze(1).expand_as(rows).flatten(0, 1)
        scale = _row_scales(rows.flatten(0, 1), each, self.num_bits).view(rows.shape[:2])
        order = torch.argsort(small.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
        batch = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        root = inverse_roots(small[batch.unsqueeze(2), order.unsqueeze(2), order.unsqueeze(1)])
        steps = scale[batch, order].unsqueeze(2).expand_as(rows)
        codes = round_columns(rows[batch, order], root, steps, self._levels)
        result = torch.empty_like(codes)
        result[batch, order] = codes
        return result, scale

    @property
    def _levels(self) -> Levels:
        # Of 8 bits -128 is left out, which has no counterpart; of 4 bits -8 is a sixteenth level.
        return Levels(max(-(2 ** (self.num_bits - 1)), -127), 2 ** (self.num_bits - 1) - 1)

    def _refit_gains(
        self, right_side: torch.Tensor, u: torch.Tensor, gram: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """Least-squares gains [A, f] for the integers of U^T [A, f, rows] and V.

        Args:
            right_side: ``V H T^T`` [A, f, rows] of the integers, T the target.
            u: the integers of U^T.
            gram: ``V H V^T`` [A, f, f] of the integers.
            start: gains to keep where the new ones are no better.
        """
        counted = u
        if self.metrics is not None:
            pairs = zip(self.metrics, u, strict=True)
            counted = torch.stack([metric.applied(rows) for metric, rows in pairs])
        system = ((counted @ u.mT) * gram).double()
        right = (counted * right_side).sum(2).double()
        diagonal = system.diagonal(dim1=1, dim2=2)
        # `tiny` where all of a tile's integers are 0.
        ridge = _GAIN_RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float64).tiny
        solved, failed = torch.linalg.solve_ex(
            system + torch.diag_embed(ridge.expand_as(right)), right
        )

        def objective(gains: torch.Tensor) -> torch.Tensor:
            return ((system @ gains.unsqueeze(2)).squeeze(2) * gains - 2 * right * gains).sum(1)

        better = (
            (failed == 0)
            & solved.isfinite().all(1)
            & (objective(solved) <= objective(start.double()))
        )
        return torch.where(better.unsqueeze(1), solved.float(), start)


def _row_scales(rows: torch.Tensor, importance: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Scale per row, never 0: absolute maximum for 8 bits, for 4 the best of some clips."""
    high = 2 ** (num_bits - 1) - 1
    # No maximum below 2^20 times the smallest normal float32: the scale's inverse stays finite.
    largest = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 2**20)
    full: torch.Tensor = largest / high
    if num_bits == 8:
        return full
    best_error = torch.full_like(full, torch.inf)
    best = full
    for clip in _CLIPS:
        scale = full * clip
        rounded = (rows / scale.unsqueeze(1)).round_().clamp_(-high - 1, high) * scale.unsqueeze(1)
        error = ((rows - rounded).square_() * importance).sum(1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best


def _product(u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """U [..., rows, f] times gains [..., f] times V [..., f, w]."""
    return (u.float() * gain.unsqueeze(-2)) @ v.float()


def sidecar_weight(sidecar: Sidecar, grid: TileGrid) -> torch.Tensor:
    """The matrix a sidecar stands for, float32 [N, K]."""
    weight = torch.empty(grid.n, grid.k, device=sidecar.u.device)
    for a in range(grid.num_row_tiles):
        rows = grid.row_slice(a)
        for b in range(grid.num_col_tiles):
            cols = grid.col_slice(b)
            weight[rows, cols] = _product(
                sidecar.u[rows, b], sidecar.v[a, :, cols], sidecar.gain[a, b]
            )
    return weight
