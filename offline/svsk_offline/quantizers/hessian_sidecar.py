# SPDX-License-Identifier: Apache-2.0
"""The sidecar fitted to the error the layer's output feels: a truncated SVD per tile under the full Hessian."""

from dataclasses import dataclass
from typing import Final

import torch

from svsk_offline.quantizers.diagonal import Sidecar
from svsk_offline.quantizers.feedback import round_with_feedback
from svsk_offline.quantizers.hessian import ColumnOrder, damped, lower_factor
from svsk_offline.quantizers.lowrank import truncated_svd
from svsk_vllm.format import TileGrid

__all__ = ["ColumnTile", "HessianSidecar", "column_tiles", "sidecar_weight"]

_CLIPS: Final = (1.0, 0.9, 0.8, 0.7, 0.62, 0.55, 0.48, 0.42, 0.36)
"""Fractions of the absolute maximum tried as the range of 4-bit factors."""

_RIDGE: Final = 1e-6
"""Relative ridge of the r x r systems."""


@dataclass(frozen=True)
class ColumnTile:
    """What one column tile needs of the Hessian, the same for all rows and all rounds."""

    columns: slice
    order: ColumnOrder
    lower: torch.Tensor  # Cholesky factor of the tile's Hessian, float32
    coupling: torch.Tensor | None  # inv(H_cc) H_c, float32 [w, K]; None when the tile is the whole dimension


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
        own = damped(hessian[columns, columns], ridge)
        order = ColumnOrder.of(own)
        lower = lower_factor(own)
        whole = own.shape[0] == grid.k
        coupling = None if whole else torch.cholesky_solve(hessian[columns].double(), lower).float()
        tiles.append(ColumnTile(columns, order, lower.float(), coupling))
    return tiles


class HessianSidecar:
    """Fits sidecars for one linear.

    Args:
        tiles: result of :func:`column_tiles` for the same grid columns.
        grid: tiles of the weight.
        rank: rank per tile.
        num_bits: 8 or 4, bits of a factor.
    """

    def __init__(
        self,
        tiles: list[ColumnTile],
        grid: TileGrid,
        rank: int,
        num_bits: int,
        row_weights: torch.Tensor | None = None,
    ) -> None:
        self.tiles, self.grid, self.rank, self.num_bits = tiles, grid, rank, num_bits
        self.row_weights = row_weights

    def fit(self, residual: torch.Tensor, sweeps: int = 3) -> Sidecar:
        """Minimise ``tr((R - U diag(gain) V) H (R - U diag(gain) V)^T)`` over rounded factors.

        Per row of tiles, column tiles are fitted in turn: in the first sweep to their own columns of the residual, then
        to what all others leave, as far as a tile can make up for it through the off-diagonal blocks of the Hessian.
        Making up for others in the first sweep, before they are fitted, ends at several times the error. V is rounded
        with error feedback under H, U is refitted to the rounded V and rounded with feedback under ``V H V^T``, and
        the gains are refitted to both.

        Args:
            residual: float32 [N, K], weight minus base.
            sweeps: passes over the column tiles; one is enough when there is only one.
        """
        grid, device = self.grid, residual.device
        u = torch.zeros(grid.n, grid.num_col_tiles, self.rank, dtype=torch.int8, device=device)
        v = torch.zeros(grid.num_row_tiles, self.rank, grid.k, dtype=torch.int8, device=device)
        gain = torch.zeros(grid.num_row_tiles, grid.num_col_tiles, self.rank, device=device)
        for a in range(grid.num_row_tiles):
            rows = grid.row_slice(a)
            left = residual[rows].clone()  # minus the product of every fitted tile
            for sweep in range(sweeps if len(self.tiles) > 1 else 1):
                for b, tile in enumerate(self.tiles):
                    if sweep:
                        left[:, tile.columns] += _product(u[rows, b], v[a, :, tile.columns], gain[a, b])
                    if tile.coupling is None:
                        target = left
                    elif sweep == 0:
                        target = left[:, tile.columns].contiguous()
                    else:
                        target = left @ tile.coupling.T
                    codes_u, codes_v, scale = self._fit_tile(target, tile, rows)
                    found = scale.numel()
                    u[rows, b], v[a, :, tile.columns], gain[a, b] = 0, 0, 0
                    u[rows, b, :found], v[a, :found, tile.columns], gain[a, b, :found] = codes_u, codes_v, scale
                    left[:, tile.columns] -= _product(u[rows, b], v[a, :, tile.columns], gain[a, b])
        return Sidecar(u, v, gain)

    def _fit_tile(
        self, target: torch.Tensor, tile: ColumnTile, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rounded U [rows, f], V [f, w] and gains [f] for one tile, f = min(rank, rows, w)."""
        weights = None if self.row_weights is None else self.row_weights[rows]
        felt_by = target if weights is None else target * weights.sqrt().unsqueeze(1)
        _, _, right = truncated_svd(felt_by @ tile.lower, self.rank)
        vectors = torch.linalg.solve_triangular(tile.lower.T, right.T, upper=True).T  # V = Q^T L^-1
        v_codes, v_scale = self._round_rows(vectors.contiguous(), tile.order)
        rounded = v_codes * v_scale.unsqueeze(1)
        felt = rounded @ tile.order.hessian  # V H
        small = damped(felt @ rounded.T, _RIDGE)
        free = torch.linalg.solve(small.double(), (felt @ target.T).double()).float()  # U^T [f, rows]
        u_codes, u_scale = self._round_rows(free, None, small, weights)
        gains = self._refit_gains(target, u_codes, v_codes, felt / v_scale.unsqueeze(1), u_scale * v_scale, weights)
        return u_codes.T.to(torch.int8), v_codes.to(torch.int8), gains

    def _round_rows(
        self,
        rows: torch.Tensor,
        order: ColumnOrder | None,
        small: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers (as float32) and scales of rows, rounded with error feedback.

        V [f, w] is fed back along its columns under the tile's Hessian (``order``), U^T [f, rows] along the ranks under
        ``V H V^T`` (``small``).
        """
        importance = order.importance if order is not None else weights
        importance = torch.ones_like(rows[0]) if importance is None else importance
        scale = _row_scales(rows, importance, self.num_bits)
        low, high = -(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1
        low = max(low, -127)
        codes = torch.empty_like(rows)

        if order is not None:

            def round_column(column: torch.Tensor, index: int) -> torch.Tensor:
                chosen = (column / scale).round_().clamp_(low, high)
                codes[:, index] = chosen
                return chosen * scale

            round_with_feedback(rows.T.contiguous(), order, round_column)
            return codes, scale
        assert small is not None, "one of the two Hessians is given"

        def round_rank(row: torch.Tensor, index: int) -> torch.Tensor:
            chosen = (row / scale[index]).round_().clamp_(low, high)
            codes[index] = chosen
            return chosen * scale[index]

        round_with_feedback(rows, ColumnOrder.of(small), round_rank)
        return codes, scale

    @staticmethod
    def _refit_gains(
        target: torch.Tensor,
        u: torch.Tensor,
        v: torch.Tensor,
        felt: torch.Tensor,
        start: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """Least-squares gains for integer factors U^T [f, rows], V [f, w] and ``V H`` [f, w] of the integers."""
        counted = u if weights is None else u * weights
        system = ((counted @ u.T) * (felt @ v.T)).double()
        right = (counted * (felt @ target.T)).sum(1).double()
        system.diagonal().add_(1e-9 * system.diagonal().mean() + torch.finfo(torch.float64).tiny)
        solved, failed = torch.linalg.solve_ex(system, right)

        def objective(gains: torch.Tensor) -> torch.Tensor:
            return gains @ system @ gains - 2 * gains @ right

        keep = (
            bool(failed)
            or not bool(torch.isfinite(solved).all())
            or bool(objective(solved) > objective(start.double()))
        )
        return start if keep else solved.float()


def _row_scales(rows: torch.Tensor, importance: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Scale per row: absolute maximum for 8 bits, searched over clips by weighted error for 4. Never zero."""
    high = 2 ** (num_bits - 1) - 1
    full: torch.Tensor = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 2**20) / high
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
    return (u.float() * gain) @ v.float()


def sidecar_weight(sidecar: Sidecar, grid: TileGrid) -> torch.Tensor:
    """The matrix a sidecar stands for, float32 [N, K]."""
    weight = torch.empty(grid.n, grid.k, device=sidecar.u.device)
    for a in range(grid.num_row_tiles):
        rows = grid.row_slice(a)
        for b in range(grid.num_col_tiles):
            cols = grid.col_slice(b)
            weight[rows, cols] = _product(sidecar.u[rows, b], sidecar.v[a, :, cols], sidecar.gain[a, b])
    return weight
