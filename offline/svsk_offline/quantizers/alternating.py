# SPDX-License-Identifier: Apache-2.0
"""Base and sidecar of one linear, each fitted in turn to what the other leaves."""

from dataclasses import dataclass

import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.quantizers.gptq import gptq, initial_scales, level_values, polish, refit_scales
from svsk_offline.quantizers.hessian import ColumnOrder, damped
from svsk_offline.quantizers.hessian_sidecar import (
    ColumnTile,
    HessianSidecar,
    column_tiles,
    sidecar_weight,
)
from svsk_offline.quantizers.rounding import nearest_codes
from svsk_offline.recipe import AlternatingArgs
from svsk_vllm.format import LinearSpec, QuantizedLinear

__all__ = ["output_error", "quantize_alternating"]


@dataclass
class _Prepared:
    """What all linears with the same input share."""

    hessian: torch.Tensor  # sink weight included, not damped
    order: ColumnOrder
    tiles: dict[tuple[int, float], list[ColumnTile]]


def output_error(
    residual: torch.Tensor, hessian: torch.Tensor, row_weights: torch.Tensor | None = None
) -> float:
    """``tr(D R H R^T)``.

    The mean squared error of the layer's output, summed over its features, D their weights.
    """
    by_row = ((residual @ hessian) * residual).sum(1)
    return float(by_row.sum() if row_weights is None else by_row @ row_weights)


def quantize_alternating(
    weight: torch.Tensor,
    statistics: InputStatistics,
    spec: LinearSpec,
    args: AlternatingArgs,
    sink_weight: float = 0.0,
    row_weights: torch.Tensor | None = None,
) -> QuantizedLinear:
    """Quantise a weight to the least error of its output that a few rounds find.

    The best round is kept.

    Args:
        weight: float32 [N, K].
        statistics: of the input, whole matrices.
        spec: name, shape and scheme.
        args: settings of the method.
        sink_weight: weight of the first token's second moment, added to the Hessian.
        row_weights: float32 [N], how much each output feature counts in the sidecar's fit; None is
            1 each.

    Raises:
        SvskError: the Hessian cannot be used.
    """
    shared = _prepare(statistics, args, sink_weight)
    codebook, rank = spec.scheme.weights.codebook, spec.rank
    sidecar = None
    if rank:
        key = (spec.grid.tile_cols, args.ridge)
        if key not in shared.tiles:
            shared.tiles[key] = column_tiles(shared.hessian, spec.grid, args.ridge)
        sidecar = HessianSidecar(shared.tiles[key], spec.grid, rank, spec.factor_bits, row_weights)
    target, best, least = weight, None, float("inf")
    rounds = args.rounds if sidecar else 1
    for number in range(1, rounds + max(1, args.polish)):
        if number <= rounds:  # from scratch, to what the sidecar leaves now
            scale = initial_scales(
                args.scales,
                target,
                shared.order.importance,
                spec.group_size,
                codebook,
                spec.scale_dtype,
            )
            levels, values = gptq(target, shared.order, scale, codebook)
        if number >= rounds and args.polish:
            scale = refit_scales(target, shared.order.hessian, levels, scale)
            levels = polish(target, shared.order.hessian, levels, scale, codebook)
            values = level_values(levels, scale)
        if sidecar is None:
            best = QuantizedLinear(spec, nearest_codes(levels, codebook), scale)
            continue
        side = sidecar.fit(weight - values)
        product = sidecar_weight(side, spec.grid)
        error = output_error(weight - values - product, shared.hessian, row_weights)
        if error < least:
            codes = nearest_codes(levels, codebook)
            least, best = error, QuantizedLinear(spec, codes, scale, side.u, side.v, side.gain)
        target = weight - product
    if best is None:
        raise SvskError(
            "the error of its output is not finite in any round. Is the weight or an activation"
            " infinite?"
        )
    return best


def _prepare(statistics: InputStatistics, args: AlternatingArgs, sink_weight: float) -> _Prepared:
    key = ("alternating", args.damping, sink_weight)
    if key not in statistics.prepared:
        hessian = statistics.hessian
        mean = float(
            hessian.diagonal().mean()
        )  # before the sink, which would raise the damping of everything
        if sink_weight:
            hessian = hessian + sink_weight * statistics.first_hessian
        order = ColumnOrder.of(damped(hessian, args.damping, mean))
        statistics.prepared[key] = _Prepared(hessian, order, {})
    prepared: _Prepared = statistics.prepared[key]
    return prepared
