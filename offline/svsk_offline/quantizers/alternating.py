# SPDX-License-Identifier: Apache-2.0
"""Base and sidecar of one linear, each fitted in turn to what the other leaves."""

from collections.abc import Callable

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.quantizers.gptq import gptq, initial_scales, level_values, polish, refit_scales
from svsk_offline.quantizers.hessian import ColumnOrder
from svsk_offline.quantizers.hessian_sidecar import (
    ColumnTile,
    HessianSidecar,
    column_tiles,
    sidecar_weight,
)
from svsk_offline.quantizers.rounding import nearest_codes
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AlternatingArgs
from svsk_vllm.format import LinearSpec, QuantizedLinear, TileGrid

__all__ = ["PreparedInput", "last_one_kept", "output_error", "quantize_alternating"]


class PreparedInput:
    """What the method derives from a linear's input; linears of one input may share it.

    Args:
        statistics: of the input, whole matrices.
        args: settings of the method.
        sink_weight: weight of the first token's second moment, added to the Hessian.

    Raises:
        SvskError: the Hessian cannot be used.
    """

    def __init__(
        self, statistics: InputStatistics, args: AlternatingArgs, sink_weight: float = 0.0
    ) -> None:
        self.args = args
        self.hessian = statistics.hessian  # sink weight included, not damped
        # Before the sink is added, which would raise the damping of every channel.
        mean = float(self.hessian.diagonal().mean())
        if sink_weight:
            self.hessian = self.hessian + sink_weight * statistics.first_hessian
        self.order = ColumnOrder.of(self.hessian, args.damping, mean)
        self._tiles: dict[int, list[ColumnTile]] = {}

    def tiles(self, grid: TileGrid) -> list[ColumnTile]:
        """The Hessian's column tiles for a grid; decomposed once for each width of tiles."""
        if grid.tile_cols not in self._tiles:
            self._tiles[grid.tile_cols] = column_tiles(self.hessian, grid, self.args.ridge)
        return self._tiles[grid.tile_cols]


def last_one_kept() -> Callable[[InputStatistics, AlternatingArgs, float], PreparedInput]:
    """:class:`PreparedInput`, made once for linears of one input that follow one another.

    Only one is kept: its matrices are the largest a run has.
    """
    kept: dict[tuple[InputStatistics, AlternatingArgs, float], PreparedInput] = {}

    def prepare(
        statistics: InputStatistics, args: AlternatingArgs, sink_weight: float
    ) -> PreparedInput:
        key = statistics, args, sink_weight
        if key not in kept:
            kept.clear()  # before the next one is made
            kept[key] = PreparedInput(*key)
        return kept[key]

    return prepare


def output_error(
    residual: torch.Tensor, hessian: torch.Tensor, metric: RowMetric | None = None
) -> float:
    """``tr(G R H R^T)``, the mean squared error of all outputs under the metric G of the rows."""
    rooted = residual if metric is None else metric.rooted(residual)
    return float(((rooted @ hessian) * rooted).sum())


def quantize_alternating(
    weight: torch.Tensor,
    given: PreparedInput,
    spec: LinearSpec,
    metric: RowMetric | None = None,
) -> QuantizedLinear:
    """Quantise a weight to the least error of its output that a few rounds find.

    Args:
        weight: float32 [N, K].
        given: its input.
        spec: name, shape and scheme.
        metric: how much errors of output features count in the sidecar's fit; None is 1 each.

    Raises:
        SvskError: the Hessian cannot be used, or no round's error is finite.
    """
    args, order = given.args, given.order
    codebook, rank = spec.scheme.weights.codebook, spec.rank
    sidecar = None
    if rank:
        tiles = given.tiles(spec.grid)
        sidecar = HessianSidecar(tiles, spec.grid, rank, spec.factor_bits, metric)
    target, best, least = weight, None, float("inf")
    near: torch.Tensor | None = None  # scales of the round before
    # Without a sidecar the base would see the same target again and again.
    rounds = args.rounds if sidecar else 1
    # The last of the rounds is the first of polish.
    for number in range(1, rounds + max(1, args.polish)):
        if number <= rounds:  # from scratch, to what the sidecar leaves now
            scale = near = initial_scales(
                args.scales,
                target,
                order.importance,
                spec.group_size,
                codebook,
                spec.scales,
                near,
            )
            levels, values = gptq(target, order, scale, codebook)
        if number >= rounds and args.polish:
            # Scales first: the codes then move under the scales they will be stored with.
            with order.damped() as hessian:
                scale = refit_scales(target, hessian, levels, scale, spec.scales)
                levels = polish(target, hessian, levels, scale, codebook)
            values = level_values(levels, scale)
        if sidecar is None:
            best = QuantizedLinear(spec, nearest_codes(levels, codebook), scale)
            continue
        side = sidecar.fit(weight - values)
        product = sidecar_weight(side, spec.grid)
        # A round may end worse than one before it, since factors are rounded: the best is kept.
        error = output_error(weight - values - product, given.hessian, metric)
        if error < least:
            codes = nearest_codes(levels, codebook)
            least, best = error, QuantizedLinear(spec, codes, scale, side.u, side.v, side.gain)
        target = weight - product
    if best is None:
        raise SvskError(
            f"{spec.name}: the error of its output is not finite in any round. Is a value of the"
            " weight, or an activation, as good as infinite?"
        )
    return best
