# SPDX-License-Identifier: Apache-2.0
"""The sidecar of the published recipe: a truncated SVD per tile, inputs weighted by energy."""

from dataclasses import dataclass

import torch

from svsk_offline.quantizers.lowrank import round_rows, truncated_svd
from svsk_vllm.format import TileGrid

__all__ = ["Sidecar", "fit_diagonal_sidecar"]


@dataclass(frozen=True)
class Sidecar:
    """Rounded factors of a whole matrix: A x B tiles of rank r."""

    u: torch.Tensor  # int8 [N, B, r]
    v: torch.Tensor  # int8 [A, r, K]
    gain: torch.Tensor  # float32 [A, B, r]


def fit_diagonal_sidecar(
    residual: torch.Tensor,
    second_moment: torch.Tensor,
    grid: TileGrid,
    rank: int,
    num_bits: int,
    ridge: float,
    seed: int = 0,
) -> Sidecar:
    """Fit ``U diag(gain) V`` to each tile of the residual, minimising ``sum_j d_j (R - U V)_ij^2``.

    ``d_j = E[x_j^2] + ridge * mean``. With ``R diag(sqrt(d)) = P S Q^T`` truncated to the rank, ``U
    = P S`` and ``V = Q^T diag(1 / sqrt(d))``; both are rounded with one scale per rank and tile. A
    tile whose rounded factors would not lower its weighted error gets gain 0, so the sidecar never
    raises it.

    Args:
        residual: float32 [N, K], weight minus base.
        second_moment: float32 [K], ``E[x_j^2]``.
        grid: tiles of the weight.
        rank: rank per tile, at least 1. Tiles smaller than the rank leave the rest at zero.
        num_bits: 8 or 4, bits of a factor.
        ridge: relative ridge of the weighting.
        seed: of the randomised SVD of very large tiles.
    """
    device = residual.device
    u = torch.zeros(grid.n, grid.num_col_tiles, rank, dtype=torch.int8, device=device)
    v = torch.zeros(grid.num_row_tiles, rank, grid.k, dtype=torch.int8, device=device)
    gain = torch.zeros(grid.num_row_tiles, grid.num_col_tiles, rank, device=device)
    mean = second_moment.mean()
    # The ridge keeps channels that calibration never used from an infinite factor in V.
    root = (second_moment + ridge * torch.where(mean > 0, mean, 1.0)).sqrt()
    for a in range(grid.num_row_tiles):
        rows = grid.row_slice(a)
        for b in range(grid.num_col_tiles):
            cols = grid.col_slice(b)
            tile, weight = residual[rows, cols], root[cols]
            left, values, right = truncated_svd(tile * weight, rank, seed)
            u_codes, u_scale = round_rows((left * values).T, num_bits)
            v_codes, v_scale = round_rows(right / weight, num_bits)
            tile_gain = u_scale * v_scale
            product = (u_codes.float().T * tile_gain) @ v_codes.float()
            # Rounding can cost more than a weak direction brings: then the tile goes without.
            if ((tile - product) * weight).square().sum() > (tile * weight).square().sum():
                continue
            kept = tile_gain.numel()  # less than the rank in a tile too small for it
            u[rows, b, :kept] = u_codes.T
            v[a, :kept, cols] = v_codes
            gain[a, b, :kept] = tile_gain
    return Sidecar(u, v, gain)
