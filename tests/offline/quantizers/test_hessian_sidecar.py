# SPDX-License-Identifier: Apache-2.0
"""The sidecar fitted to the error that a layer's output feels."""

from itertools import pairwise

import pytest
import torch

from svsk_offline.quantizers.alternating import output_error
from svsk_offline.quantizers.hessian import damped
from svsk_offline.quantizers.hessian_sidecar import HessianSidecar, column_tiles, sidecar_weight
from svsk_vllm.format import TileGrid
from tests.offline.quantizers.correlated import statistics
from tests.offline.quantizers.test_quantizers import weight


@pytest.mark.parametrize("num_bits", [4, 8])
def test_ranks_beyond_a_block_of_columns_help(num_bits: int) -> None:
    """U has a column per rank, and is rounded in blocks of 128."""
    n, k = 300, 320
    hessian, residual = statistics(k, 2000).hessian, weight(n, k, 5) * 0.1
    grid = TileGrid(n, k, 0, 0)
    tiles = column_tiles(hessian, grid, 1e-4)
    errors = []
    for rank in (64, 128, 130, 256, 300):
        side = HessianSidecar(tiles, grid, rank, num_bits).fit(residual)
        errors.append(output_error(residual - sidecar_weight(side, grid), hessian))
    assert all(less > more for less, more in pairwise(errors))


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("tile_m", "tile_n"), [(0, 0), (20, 0), (16, 40), (512, 30)])
def test_hessian_sidecar_lowers_the_error_and_ranks_help(
    num_bits: int, tile_m: int, tile_n: int
) -> None:
    found = statistics(96)
    residual = weight(50, 96, 5) * 0.1
    grid = TileGrid(50, 96, tile_m, tile_n)
    tiles = column_tiles(found.hessian, grid, 1e-4)
    errors = [output_error(residual, found.hessian)]
    for rank in (2, 8):
        side = HessianSidecar(tiles, grid, rank, num_bits).fit(residual)
        assert int(side.u.abs().max()) <= (8 if num_bits == 4 else 127)
        assert int(side.v.min()) >= (-8 if num_bits == 4 else -127)
        errors.append(output_error(residual - sidecar_weight(side, grid), found.hessian))
    # In tiles this small, 4-bit rounding of the strongest factors can outweigh what further ranks
    # add.
    assert errors[0] > errors[1] > (errors[2] if num_bits == 8 else 0)
    assert errors[2] < 0.1 * errors[0]


def test_tiles_larger_than_the_matrix() -> None:
    w, hessian = weight(40, 96), statistics(96).hessian
    fits = []
    for tile_m, tile_n in ((0, 0), (100_000, 5_000)):
        grid = TileGrid(40, 96, tile_m, tile_n)
        fits.append(HessianSidecar(column_tiles(hessian, grid, 1e-4), grid, 4, 4).fit(w))
    assert torch.equal(fits[0].u, fits[1].u)
    assert torch.equal(fits[0].gain, fits[1].gain)


def test_column_tiles_cooperate() -> None:
    """Each tile on its own is the first sweep.

    Further sweeps use the correlation between tiles and never hurt much.
    """
    found, residual = statistics(512, 3000), weight(128, 512, 1) * 0.1
    grid = TileGrid(128, 512, 0, 100)
    sidecar = HessianSidecar(column_tiles(found.hessian, grid, 1e-4), grid, 8, 8)
    errors = [
        output_error(residual - sidecar_weight(sidecar.fit(residual, sweeps), grid), found.hessian)
        for sweeps in (1, 2, 3)
    ]
    assert errors[0] < 0.05 * output_error(residual, found.hessian)
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 1.01 * errors[1]


def test_hessian_sidecar_is_near_the_best_of_its_rank() -> None:
    """On one tile: the truncated SVD of R L is the optimum without rounding."""
    found, residual = statistics(64), weight(40, 64, 2)
    grid = TileGrid(40, 64, 0, 0)
    side = HessianSidecar(column_tiles(found.hessian, grid, 1e-4), grid, 8, 8).fit(residual)
    reached = output_error(residual - sidecar_weight(side, grid), found.hessian)
    lower = torch.linalg.cholesky(damped(found.hessian, 1e-4).double())
    best = float(torch.linalg.svdvals(residual.double() @ lower)[8:].square().sum())
    assert best * 0.99 < reached < best * 1.1
