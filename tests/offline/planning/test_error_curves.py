# SPDX-License-Identifier: Apache-2.0
"""Estimated losses of the ways to store a matrix, against what quantising it really gives."""

import pytest
import torch

from svsk_kernels.tile_grid import TileGrid
from svsk_offline.calibration import InputStatistics
from svsk_offline.planning.bit_budget import allocate
from svsk_offline.planning.error_curves import CurveSettings, measure_curve, scheme_with
from svsk_offline.quantizers.alternating import (
    PreparedInput,
    output_error,
    quantize_alternating,
)
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AllocationArgs, AlternatingArgs
from svsk_vllm.format import LinearSpec, dequantize
from svsk_vllm.format.group_scales import ScaleBits
from tests.offline.planning.choices import choices_of
from tests.offline.quantizers.correlated import inputs, statistics
from tests.offline.quantizers.test_quantizers import weight
from tests.support.format_builders import make_group


@pytest.mark.parametrize(("tile_m", "tile_n"), [(0, 0), (20, 0), (32, 40)])
def test_losses_fall_as_they_do_in_fact(tile_m: int, tile_n: int) -> None:
    """With several column tiles too, whose own errors add up to more than the whole."""
    w, found = weight(48, 192), statistics(192)
    rows = 0.5 + torch.rand(48, generator=torch.Generator().manual_seed(0))
    group = make_group(tile_m=tile_m, tile_n=tile_n, num_bits=4)
    spec = LinearSpec("m", 48, 192, group)
    ranks = (0, 2, 4, 8)
    metric = RowMetric.diagonal(rows)
    choices = choices_of(
        w,
        found.hessian,
        rows,
        spec,
        AlternatingArgs(rounds=1),
        AllocationArgs(target_bpw=5, ranks=ranks, group_sizes=(64, 16), scale_bits=(16, 6)),
    )
    bases: list[tuple[int, ScaleBits]] = [(64, 16), (64, 6), (16, 16), (16, 6)]
    assert {(*c.base, c.rank) for c in choices} == {(*b, r) for b in bases for r in ranks}
    for base in bases:
        losses = [c.loss for c in choices if c.base == base]
        bits = [c.stored_bits for c in choices if c.base == base]
        assert losses == sorted(losses, reverse=True)
        assert bits == sorted(bits)
        for choice in (c for c in choices if c.base == base):
            own = make_group(
                tile_m=tile_m,
                tile_n=tile_n,
                num_bits=4,
                rank=choice.rank,
                group_size=base[0],
                scale_bits=base[1],
            )
            stored = LinearSpec("m", 48, 192, own)
            linear = quantize_alternating(
                w, PreparedInput(found, AlternatingArgs(rounds=1)), stored, metric
            )
            real = 0.5 * output_error(w - dequantize(linear), found.hessian, metric)
            assert 0.5 < choice.loss / real < 2
            assert choice.stored_bits == stored.stored_bits


def test_large_ranks_are_chosen_where_they_pay() -> None:
    """Their losses are those of quantising with them, and a budget that has the room takes one."""
    n, k = 320, 384
    w, found = weight(n, k), statistics(k, 2000)
    rows = torch.ones(n)
    spec = LinearSpec("m", n, k, make_group(tile_m=0, tile_n=0, num_bits=4))
    args = AlternatingArgs(rounds=1)
    allocation = AllocationArgs(target_bpw=8, ranks=(0, 128, 160, 256), group_sizes=(64,))
    choices = choices_of(w, found.hessian, rows, spec, args, allocation)
    losses = [choice.loss for choice in choices]
    assert losses == sorted(losses, reverse=True)
    target = choices[2].stored_bits / spec.num_weights + 0.1
    assert allocate({"m": choices}, {"m": 0}, target, spec.num_weights)["m"] is choices[2]
    stored = LinearSpec("m", n, k, scheme_with(spec.scheme, choices[2].base, 160, 4))
    linear = quantize_alternating(w, PreparedInput(found, args), stored)
    real = 0.5 * output_error(w - dequantize(linear), found.hessian)
    assert 0.5 < choices[2].loss / real < 2


@pytest.mark.parametrize(
    ("n", "k", "tiles", "largest"),
    [
        (4095, 20_000, (0, 0), 128),
        (4096, 4096, (0, 0), 256),
        (14_336, 5120, (0, 0), 320),
        (8192, 8192, (0, 0), 512),
        (50_000, 50_000, (0, 0), 512),
        (8192, 8192, (512, 1024), 128),
        (8192, 8192, (9000, 4096), 256),
    ],
)
def test_ranks_over_128_only_for_large_tiles(
    n: int, k: int, tiles: tuple[int, int], largest: int
) -> None:
    """And those that a recipe names for all."""
    grid = TileGrid(n, k, *tiles)
    assert max(AllocationArgs(target_bpw=5).ranks_for(grid)) == largest
    assert AllocationArgs(target_bpw=5, ranks=(0, 300)).ranks_for(grid) == (0, 300)


def test_small_matrices_are_measured_up_to_rank_128() -> None:
    w, found = weight(16, 64), statistics(64)
    spec = LinearSpec("m", 16, 64, make_group(tile_m=0, tile_n=0, num_bits=4))
    allocation, args = AllocationArgs(target_bpw=5, group_sizes=(64,)), AlternatingArgs(rounds=1)
    settings = CurveSettings.of(spec.scheme, args, allocation, spec.scale_dtype)
    ones = torch.ones(16)
    curve = measure_curve(w, found.hessian, ones, RowMetric.diagonal(ones), settings)
    assert len(curve.shares) == 128
    assert max(choice.rank for choice in curve.choices(spec, 1, allocation)) == 128


@pytest.mark.parametrize("tile", [0, 32])
def test_losses_are_those_of_the_tokens_they_are_measured_on(tile: int) -> None:
    """Few tokens are fitted closely, and say nothing of others; the measured ones do."""
    w = weight(48, 192)
    x = inputs(192, 4200)
    few, other, many = (InputStatistics(192, torch.device("cpu"), full=True) for _ in range(3))
    few.add(x[:, :200])
    other.add(x[:, 200:2200])
    many.add(x[:, 2200:])
    spec = LinearSpec("m", 48, 192, make_group(tile_m=tile, tile_n=tile, num_bits=4, rank=4))
    args = AlternatingArgs(rounds=1)
    allocation = AllocationArgs(target_bpw=5, ranks=(0, 4), group_sizes=(spec.group_size,))
    rows = torch.ones(48)
    linear = quantize_alternating(w, PreparedInput(few, args), spec)
    true = 0.5 * output_error(w - dequantize(linear), many.hessian)
    predicted = [
        choices_of(w, few.hessian, rows, spec, args, allocation, measured)[1].loss
        for measured in (None, other.hessian)
    ]
    assert predicted[0] < 0.5 * true
    assert 0.7 * true < predicted[1] < 1.4 * true


@pytest.mark.parametrize("tile", [0, 16])
def test_ranks_that_fit_chance_are_judged_by_other_tokens(tile: int) -> None:
    """Directions of few gradients: under the fitted metric the ranks gain far more than is so."""
    w, found = weight(48, 96), statistics(96, tokens=4000)
    generator = torch.Generator().manual_seed(2)
    few, many = (torch.randn(count, 48, generator=generator) for count in (12, 4000))
    fitted, felt = few.T @ few / len(few), many.T @ many / len(many)
    metric, ones = RowMetric.of(fitted, 48), torch.ones(48)
    spec = LinearSpec("m", 48, 96, make_group(tile_m=tile, tile_n=0, num_bits=4, group_size=32))
    allocation = AllocationArgs(target_bpw=5, ranks=(0, 4), group_sizes=(spec.group_size,))
    settings = CurveSettings.of(spec.scheme, AlternatingArgs(), allocation, spec.scale_dtype)

    def share(judge: torch.Tensor) -> float:
        curve = measure_curve(w, found.hessian, ones, metric, settings, felt=judge)
        return float(curve.shares.sum())

    hopeful, honest = share(fitted), share(felt)
    assert honest < 0.8 * hopeful
    # What error is left of the same factors under either metric, from the factors themselves.
    plain = measure_curve(w, found.hessian, ones, RowMetric.diagonal(ones), settings)
    assert float(plain.shares.sum()) > honest
