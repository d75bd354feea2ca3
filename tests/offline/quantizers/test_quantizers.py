# SPDX-License-Identifier: Apache-2.0
"""Invariants of the base quantiser and the sidecar fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svsk_offline.quantizers.activation_aware import channel_importance, quantize_aa
from svsk_offline.quantizers.diagonal_sidecar import fit_diagonal_sidecar
from svsk_offline.quantizers.lowrank import round_rows, truncated_svd
from svsk_offline.quantizers.rounding import nearest_codes
from svsk_vllm.format import (
    Codebook,
    LinearSpec,
    QuantizedLinear,
    TileGrid,
    code_values,
    codebook_levels,
    dequantize,
)
from svsk_vllm.format.group_scales import GroupScales
from tests.offline.quantizers.plain import quantize_rtn
from tests.support.format_builders import make_group, property_test

CODEBOOKS: tuple[Codebook, ...] = ("int4", "quad8")
GRID = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as real weights are, with a few channels ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator) * torch.rand(n, k, generator=generator).add(0.2)
    values[:, :: k // 4] *= 10
    return values * 0.02


def moments(k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(k, generator=torch.Generator().manual_seed(seed)).pow(4) * 100 + 1e-4


def values_of(
    codes: torch.Tensor, scale: torch.Tensor, group: int, codebook: Codebook
) -> torch.Tensor:
    return (
        code_values(codes, codebook).view(codes.shape[0], -1, group) * scale.float().unsqueeze(-1)
    ).flatten(1)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_no_group_is_worse_than_round_to_nearest(
    codebook: Codebook, dtype: torch.dtype, group: int, alpha: float
) -> None:
    w = weight(40, 192)
    importance = channel_importance(moments(192), alpha, (0.25, 4.0))
    errors = []
    for codes, scale in (
        quantize_aa(w, importance, group, codebook, GroupScales(dtype), GRID),
        quantize_rtn(w, group, codebook, dtype),
    ):
        assert codes.dtype == torch.int8
        assert scale.dtype == dtype
        error = (w - values_of(codes, scale, group, codebook)).square() * importance
        errors.append(error.view(40, -1, group).sum(-1))
    aa, rtn = errors
    assert bool((aa <= rtn).all())
    assert float(aa.sum()) < 0.99 * float(rtn.sum())


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_nearest_code_is_the_nearest_level(codebook: Codebook) -> None:
    ratio = torch.linspace(-20, 20, 4001)
    levels = codebook_levels(codebook)
    chosen = levels[nearest_codes(ratio, codebook).long() + 8]
    best = (ratio.unsqueeze(1) - levels).abs().amin(1)
    torch.testing.assert_close((ratio - chosen).abs(), best)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_zero_and_tiny_groups(codebook: Codebook) -> None:
    w = torch.zeros(3, 64)
    w[1] = 1e-9  # scale underflows in float16
    w[2] = torch.linspace(-1, 1, 64)
    codes, scale = quantize_aa(w, torch.ones(64), 64, codebook, GroupScales(torch.float16), GRID)
    assert torch.isfinite(scale.float()).all()
    values = values_of(codes, scale, 64, codebook)
    assert not values[0].any()
    assert float(values[1].abs().max()) <= 2e-9
    assert float((values[2] - w[2]).abs().max()) < 0.2


def test_importance_is_clipped_and_relative() -> None:
    importance = channel_importance(torch.tensor([0.0, 1.0, 1.0, 1e6]), 0.5, (0.25, 4.0))
    assert float(importance[0]) == 0.25
    # Of three in use: the zero is not.
    assert float(importance[3]) == pytest.approx(3**0.5, rel=1e-3)
    assert torch.equal(channel_importance(torch.zeros(4), 0.5, (0.25, 4.0)), torch.full((4,), 0.25))


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k", "rank", "tile_m", "tile_n"),
    [(64, 96, 8, 0, 0), (50, 96, 4, 16, 40), (20, 64, 32, 7, 9), (33, 64, 2, 512, 1024)],
)
def test_sidecar_never_raises_the_weighted_error_of_a_tile(
    num_bits: int, n: int, k: int, rank: int, tile_m: int, tile_n: int
) -> None:
    moment, residual = moments(k), weight(n, k) * 0.1
    grid = TileGrid(n, k, tile_m, tile_n)
    side = fit_diagonal_sidecar(residual, moment, grid, rank, num_bits, 1e-4)
    after = residual - product(side.u, side.v, side.gain, grid)
    for a in range(grid.num_row_tiles):
        for b in range(grid.num_col_tiles):
            rows, cols = grid.row_slice(a), grid.col_slice(b)
            before_tile = float((residual[rows, cols].square() @ moment[cols]).sum())
            assert float((after[rows, cols].square() @ moment[cols]).sum()) <= before_tile * (
                1 + 1e-3
            )
    assert float((after.square() @ moment).sum()) < 0.95 * float((residual.square() @ moment).sum())


def product(u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """U diag(gain) V, through the format's own reference."""
    rank = u.shape[2]
    padded = -(-grid.k // 32) * 32
    group = make_group(rank=rank, tile_m=grid.tile_rows, tile_n=grid.tile_cols, group_size=32)
    spec = LinearSpec("m", grid.n, padded, group)
    columns = -(-padded // grid.tile_cols)
    wide_u = torch.zeros(grid.n, columns, rank, dtype=torch.int8)
    wide_u[:, : u.shape[1]] = u
    wide_v = torch.zeros(v.shape[0], rank, padded, dtype=torch.int8)
    wide_v[:, :, : grid.k] = v
    wide_gain = torch.zeros(v.shape[0], columns, rank)
    wide_gain[:, : gain.shape[1]] = gain
    codes = torch.zeros(grid.n, padded, dtype=torch.int8)
    scale = torch.zeros(grid.n, padded // 32, dtype=torch.bfloat16)
    return dequantize(QuantizedLinear(spec, codes, scale, wide_u, wide_v, wide_gain))[:, : grid.k]


def test_an_exactly_low_rank_residual_is_repaired() -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(60, 3, generator=generator) @ torch.randn(3, 80, generator=generator)
    grid = TileGrid(60, 80, 0, 0)
    side = fit_diagonal_sidecar(residual, torch.ones(80), grid, 3, 8, 1e-4)
    left = residual - product(side.u, side.v, side.gain, grid)
    assert float(left.norm() / residual.norm()) < 0.01


def test_a_zero_residual_gives_no_sidecar() -> None:
    side = fit_diagonal_sidecar(
        torch.zeros(8, 32), torch.ones(32), TileGrid(8, 32, 4, 16), 4, 8, 1e-4
    )
    assert not any(tensor.any() for tensor in (side.u, side.v, side.gain))


def test_a_larger_rank_is_no_worse() -> None:
    residual, moment, grid = weight(64, 96, 3), moments(96), TileGrid(64, 96, 32, 48)
    errors = []
    for rank in (1, 4, 16):
        side = fit_diagonal_sidecar(residual, moment, grid, rank, 8, 1e-4)
        errors.append(
            float(((residual - product(side.u, side.v, side.gain, grid)).square() @ moment).sum())
        )
    assert errors[0] > errors[1] > errors[2]


@property_test
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 30), st.integers(0, 5))
def test_truncated_svd_is_the_best_of_its_rank(m: int, n: int, rank: int, seed: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    left, values, right = truncated_svd(matrix, rank)
    kept = min(rank, m, n)
    assert left.shape == (m, kept)
    assert right.shape == (kept, n)
    best = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(values.double(), best[:kept], rtol=1e-4, atol=1e-5)
    error = (matrix.double() - (left * values).double() @ right.double()).square().sum()
    torch.testing.assert_close(error, best[kept:].square().sum(), rtol=1e-3, atol=1e-8)


def test_truncated_svd_of_a_large_matrix_is_close_and_repeatable() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(1, 0.02, 1600)
    matrix = torch.randn(1600, 1600, generator=generator) * spectrum
    left, values, right = truncated_svd(matrix, 8, seed=3)
    again = truncated_svd(matrix, 8, seed=3)
    assert all(torch.equal(a, b) for a, b in zip((left, values, right), again, strict=True))
    best = torch.linalg.svdvals(matrix)[:8]
    assert bool((values > 0.97 * best).all())


@pytest.mark.parametrize(("num_bits", "highest"), [(8, 127), (4, 7)])
def test_rounded_rows(num_bits: int, highest: int) -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rows[2] = 0
    codes, scale = round_rows(rows, num_bits)
    assert int(codes.abs().max()) == highest
    assert float(scale[2]) == 0
    assert bool(((codes * scale.unsqueeze(1) - rows).abs() <= scale.unsqueeze(1) / 2 + 1e-7).all())
