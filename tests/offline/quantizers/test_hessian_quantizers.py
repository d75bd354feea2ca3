# SPDX-License-Identifier: Apache-2.0
"""Error feedback, scale search, polish, and their alternation with a sidecar."""

from typing import get_args

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import InputStatistics
from svsk_offline.quantizers.activation_aware import quantize_aa
from svsk_offline.quantizers.alternating import (
    PreparedInput,
    output_error,
    quantize_alternating,
)
from svsk_offline.quantizers.error_feedback import (
    Levels,
    round_columns,
    round_in_a_loop,
    round_with_feedback,
)
from svsk_offline.quantizers.gptq import (
    gptq,
    initial_scales,
    level_values,
    polish,
    refit_scales,
    search_scales,
)
from svsk_offline.quantizers.hessian import ColumnOrder, damped
from svsk_offline.quantizers.rounding import nearest_codes, nearest_levels
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AlternatingArgs
from svsk_vllm.format import Codebook, LinearSpec, codebook_levels, dequantize
from svsk_vllm.format.group_scales import GroupScales, ScaleBits, split_scales
from tests.offline.quantizers.correlated import inputs, statistics
from tests.offline.quantizers.plain import quantize_rtn
from tests.offline.quantizers.test_quantizers import CODEBOOKS, GRID, values_of, weight
from tests.support.format_builders import make_group

BFLOAT16 = GroupScales(torch.bfloat16)


@pytest.mark.parametrize("k", [5, 128, 200])
def test_feedback_equals_the_textbook_recursion(k: int) -> None:
    """The blocked procedure against single columns and an inverse updated by elimination."""
    hessian = damped(statistics(k).hessian, 0.05).double().float()
    order = ColumnOrder.of(hessian)
    target = torch.randn(7, k, generator=torch.Generator().manual_seed(1))
    tenths = torch.full((1, 7), 0.1)
    rounded = round_with_feedback(target.T.contiguous(), order, tenths, Levels(-1000, 1000)) / 10
    work, inverse = target.double().clone(), torch.linalg.inv(hessian.double())
    expected = torch.empty(k, 7, dtype=torch.float64)
    for j in order.order.tolist():
        expected[j] = (work[:, j] * 10).round() / 10
        error = (work[:, j] - expected[j]) / inverse[j, j]
        work -= error.unsqueeze(1) * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0
    agreement = float((rounded.double() - expected).abs().lt(1e-6).double().mean())
    assert agreement > 0.99  # a tie may fall the other way in float32


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("scale_bits", get_args(ScaleBits))
def test_each_step_lowers_the_error(
    codebook: Codebook, dtype: torch.dtype, group: int, scale_bits: ScaleBits
) -> None:
    w = weight(48, 192)
    found = statistics(192)
    order = ColumnOrder.of(damped(found.hessian, 0.01))
    codes, rtn_scale = quantize_rtn(w, group, codebook, dtype)
    rtn = output_error(w - values_of(codes, rtn_scale, group, codebook), order.hessian)
    stored = GroupScales(dtype, scale_bits)
    scale = search_scales(w, order.importance, group, codebook, stored)
    assert scale.dtype == dtype
    levels, values = gptq(w, order, scale, codebook)
    assert set(levels.unique().tolist()) <= set(codebook_levels(codebook).tolist())
    fed_back = output_error(w - values, order.hessian)
    polished = polish(w, order.hessian, levels.clone(), scale, codebook, 2)
    value = values_of(nearest_codes(polished, codebook), scale, group, codebook)
    assert output_error(w - value, order.hessian) <= fed_back < 0.65 * rtn


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_refitted_scales_are_the_least_squares_ones(codebook: Codebook) -> None:
    """They find a weight's scales, never raise a row's error, and leave unused groups alone."""
    k, group, n = 96, 32, 20
    hessian = damped(statistics(k).hessian, 0.01)
    generator = torch.Generator().manual_seed(1)
    grid = codebook_levels(codebook)
    levels = grid[torch.randint(0, 16, (n, k), generator=generator)]
    scale = (0.01 + torch.rand(n, k // group, generator=generator)).bfloat16()
    made = level_values(levels, scale)
    start = (scale.float() * 1.3).bfloat16()
    assert torch.equal(refit_scales(made, hessian, levels, start, BFLOAT16), scale)
    assert torch.equal(refit_scales(made, hessian, levels, scale, BFLOAT16), scale)
    levels[:, group : 2 * group] = 0
    noisy = made + 0.1 * torch.randn(n, k, generator=generator)
    found = refit_scales(noisy, hessian, levels, start, BFLOAT16)
    assert torch.isfinite(found).all()
    for row in range(n):
        before, after = (
            output_error((noisy - level_values(levels, s))[row : row + 1], hessian)
            for s in (start, found)
        )
        assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize("scale_bits", [6, 8])
def test_scales_in_two_levels_stay_on_their_grid(
    scale_bits: ScaleBits,
) -> None:
    """Every one can be stored; the finer the codes, the nearer the error to that of free scales."""
    k, group, n = 128, 16, 24
    hessian = damped(statistics(k).hessian, 0.01)
    order = ColumnOrder.of(hessian)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    stored = GroupScales(torch.bfloat16, scale_bits)
    free = search_scales(w, order.importance, group, "quad8", GroupScales(torch.float32))
    scale = search_scales(w, order.importance, group, "quad8", stored)
    levels, values = gptq(w, order, scale, "quad8")
    refitted = refit_scales(w, hessian, levels, scale, stored)
    for each in (scale, refitted):
        split_scales(each, scale_bits)  # raises where one cannot be stored
    assert output_error(w - level_values(levels, refitted), hessian) < output_error(
        w - values, hessian
    )
    # Half a step of a code in 31 (or 127) for the largest scales, several for the smallest.
    freely = output_error(w - gptq(w, order, free, "quad8")[1], hessian)
    assert output_error(w - values, hessian) < freely * {8: 1.08, 6: 1.15}[scale_bits]


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_searched_scales_are_no_worse_than_clipped_ones(codebook: Codebook) -> None:
    """Under plain rounding with the same weights; least squares and both signs can only help."""
    w, importance = (
        weight(40, 128),
        torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.1,
    )

    def rounded(scale: torch.Tensor) -> torch.Tensor:
        return values_of(
            nearest_codes(w / scale.float().repeat_interleave(64, 1), codebook), scale, 64, codebook
        )

    searched = rounded(initial_scales("search", w, importance, 64, codebook, BFLOAT16))
    plain = rounded(initial_scales("absmax", w, importance, 64, codebook, BFLOAT16))
    codes, clipped_scale = quantize_aa(w, importance, 64, codebook, BFLOAT16, GRID)
    clipped = values_of(codes, clipped_scale, 64, codebook)

    def error(values: torch.Tensor) -> float:
        return float(((w - values).square() * importance).sum())

    assert error(searched) < 0.95 * error(clipped)
    assert error(clipped) < error(plain)


@pytest.mark.parametrize("scale_bits", [6, 16])
def test_a_search_nearby_ends_as_well_as_a_whole_one(scale_bits: ScaleBits) -> None:
    """From the scales of a weight that differs by a hundredth; a group of zeros is found anew."""
    generator = torch.Generator().manual_seed(0)
    w, importance = weight(40, 128), torch.rand(128, generator=generator) + 0.1
    before = w + weight(40, 128, 3) * 0.01
    before[:, :16] = 0
    stored = GroupScales(torch.bfloat16, scale_bits)
    start = search_scales(before, importance, 16, "quad8", stored)
    assert not bool(start[:, 0].any())

    def error(scale: torch.Tensor) -> float:
        wide = scale.float().repeat_interleave(16, 1)
        return float(((w - nearest_levels(w / wide, "quad8") * wide).square() * importance).sum())

    whole = search_scales(w, importance, 16, "quad8", stored)
    near = search_scales(w, importance, 16, "quad8", stored, near=start)
    assert bool((near != 0).all())
    assert error(near) < 1.05 * error(whole)  # one sign is tried, not two
    assert error(near) < 0.97 * error(whole * 1.06)


def test_scales_of_one_row_are_refitted_as_among_others() -> None:
    """With one row, a row and a column of its system lie on top of each other in memory."""
    w, order = weight(5, 64), ColumnOrder.of(statistics(64).hessian, 0.01)
    stored = GroupScales(torch.bfloat16)
    scale = initial_scales("absmax", w, order.importance, 16, "int4", stored)
    levels = gptq(w, order, scale, "int4")[0]
    together = refit_scales(w, order.hessian, levels, scale, stored)
    alone = [
        refit_scales(w[i : i + 1], order.hessian, levels[i : i + 1], scale[i : i + 1], stored)
        for i in range(5)
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0.01, atol=0)


@pytest.mark.parametrize("matrices", [1, 3])
def test_columns_in_blocks_are_rounded_as_in_one(matrices: int) -> None:
    """Whole numbers throughout, so that no order of sums changes a bit."""
    generator = torch.Generator().manual_seed(0)
    columns = 300
    work = torch.randint(-40, 41, (matrices, columns, 7), generator=generator).float()
    coupling = torch.randint(-1, 2, (matrices, columns, columns), generator=generator).float()
    root = (coupling * (torch.rand(coupling.shape, generator=generator) < 0.02)).triu(1)
    root += torch.eye(columns)
    fives = torch.full((1, 1, 1), 5.0).expand(matrices, columns, 7)
    levels = Levels(-100, 100)
    pivots = root.diagonal(dim1=1, dim2=2)
    whole, errors = round_in_a_loop(work.clone(), root, pivots, fives, levels)
    assert bool((whole != (work / 5).round()).any()), "no error was carried on"
    assert float(errors.abs().max()) < 2**20, "sums are not exact"
    assert torch.equal(round_columns(work, root, fives, levels), whole)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_alternation(rank: int, codebook: Codebook) -> None:
    w, found = weight(48, 128), statistics(128)
    group = make_group(rank=rank, tile_m=20, tile_n=72, num_bits=4, codebook=codebook)
    spec = LinearSpec("m", 48, 128, group)
    errors = []
    for rounds in (1, 4):
        linear = quantize_alternating(w, PreparedInput(found, AlternatingArgs(rounds=rounds)), spec)
        linear.to_tensors()  # raises when a tensor does not follow the format
        errors.append(output_error(w - dequantize(linear), found.hessian))
    assert errors[1] <= errors[0]
    if rank:
        bare = LinearSpec("m", 48, 128, make_group(codebook=codebook))
        base = quantize_alternating(w, PreparedInput(found, AlternatingArgs()), bare)
        assert errors[1] <= errors[0] < output_error(w - dequantize(base), found.hessian)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_closing_rounds_lower_the_error(rank: int, codebook: Codebook) -> None:
    w, found = weight(48, 128), statistics(128)
    spec = LinearSpec(
        "m", 48, 128, make_group(rank=rank, tile_m=0, tile_n=0, num_bits=4, codebook=codebook)
    )
    errors = []
    for polish_rounds in (0, 1, 4):
        linear = quantize_alternating(
            w, PreparedInput(found, AlternatingArgs(rounds=2, polish=polish_rounds)), spec
        )
        errors.append(output_error(w - dequantize(linear), found.hessian))
    assert errors[2] < errors[1] < errors[0]


def test_row_weights_move_the_error_to_rows_that_count_less() -> None:
    w, found = weight(48, 128), statistics(128)
    spec = LinearSpec("m", 48, 128, make_group(rank=6, tile_m=0, tile_n=0, num_bits=4))
    rows = torch.where(torch.arange(48) < 8, 100.0, 1.0)
    shares = []
    for metric in (None, RowMetric.diagonal(rows)):
        linear = quantize_alternating(
            w, PreparedInput(found, AlternatingArgs(rounds=2)), spec, metric
        )
        residual = w - dequantize(linear)
        shares.append(
            output_error(residual[:8], found.hessian) / output_error(residual, found.hessian)
        )
    assert shares[1] < 0.8 * shares[0]


@pytest.mark.parametrize("tile_m", [0, 20])
def test_a_metric_of_directions_moves_the_error_out_of_them(tile_m: int) -> None:
    """A sidecar of few ranks first takes off what rows have in common, where that is felt."""
    w, found = weight(48, 128), statistics(128)
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(3, 48, generator=generator)
    metric = RowMetric(torch.ones(48), 10 * common)
    spec = LinearSpec("m", 48, 128, make_group(rank=4, tile_m=tile_m, tile_n=0, num_bits=8))
    errors = []
    for given in (RowMetric.diagonal(metric.weights), metric):
        linear = quantize_alternating(
            w, PreparedInput(found, AlternatingArgs(rounds=2)), spec, given
        )
        errors.append(output_error(w - dequantize(linear), found.hessian, metric))
    assert errors[1] < 0.8 * errors[0]


def test_sink_weight_moves_the_error_away_from_the_first_token() -> None:
    w = weight(48, 128)
    x = inputs(128, 400).view(4, 100, 128)
    x[:, 0] = torch.randn(128, generator=torch.Generator().manual_seed(9)) * 3
    found = InputStatistics(128, torch.device("cpu"), full=True, first=True)
    found.add(x)
    spec = LinearSpec("m", 48, 128, make_group())
    errors = []
    for sink in (0.0, 10.0):
        residual = w - dequantize(
            quantize_alternating(w, PreparedInput(found, AlternatingArgs(), sink), spec)
        )
        errors.append(output_error(residual, found.first_hessian))
    assert errors[1] < 0.5 * errors[0]


def test_unused_channels_and_layers() -> None:
    """Channels that are always zero, and an input that is always zero, give finite results."""
    x = inputs(64)
    x[..., 5:20] = 0
    for data in (x, torch.zeros_like(x)):
        found = InputStatistics(64, torch.device("cpu"), full=True)
        found.add(data)
        spec = LinearSpec("m", 32, 64, make_group(rank=4, tile_m=0, tile_n=0))
        linear = quantize_alternating(weight(32, 64), PreparedInput(found, AlternatingArgs()), spec)
        assert torch.isfinite(dequantize(linear)).all()


def test_errors_that_are_not_finite_in_any_round_are_refused() -> None:
    """Weights so large that only the sum over all outputs is beyond float32."""
    found = InputStatistics(64, torch.device("cpu"), full=True)
    found.add(torch.randn(1, 4000, 64, generator=torch.Generator().manual_seed(0)))
    given = PreparedInput(found, AlternatingArgs())
    spec = LinearSpec("m", 1024, 64, make_group(rank=1, tile_m=0, tile_n=0))
    with pytest.raises(SvskError, match="m: the error of its output is not finite in any round"):
        quantize_alternating(weight(1024, 64) * 1.6e19, given, spec)
    with pytest.raises(SvskError, match="not finite: the model's activations or weights overflow"):
        quantize_alternating(weight(1024, 64) * 1e25, given, spec)
