# SPDX-License-Identifier: Apache-2.0
"""Quantising one linear layer."""

from collections.abc import Callable

import torch

from svsk_offline.calibration.input_statistics import InputStatistics
from svsk_offline.quantizers.activation_aware import channel_importance, quantize_aa
from svsk_offline.quantizers.alternating import PreparedInput, quantize_alternating
from svsk_offline.quantizers.diagonal_sidecar import fit_diagonal_sidecar
from svsk_offline.quantizers.rounding import require_finite
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AlternatingArgs, PublishedArgs, PublishedRecipe, Recipe
from svsk_vllm.format import ConfigGroup, LinearSpec, QuantizedLinear, dequantize

__all__ = ["quantize_linear"]


def quantize_linear(
    name: str,
    weight: torch.Tensor,
    statistics: InputStatistics,
    recipe: Recipe,
    scheme: ConfigGroup,
    scale_dtype: torch.dtype,
    metric: RowMetric | None = None,
    prepare: Callable[[InputStatistics, AlternatingArgs, float], PreparedInput] = PreparedInput,
) -> QuantizedLinear:
    """Quantise one weight by a recipe.

    Args:
        name: Hugging Face module name.
        weight: [N, K], any floating dtype.
        statistics: of the layer's input; whole matrices for the method alternating.
        recipe: how.
        scheme: group size, codebook, sidecar shape.
        scale_dtype: stored dtype of the scales.
        metric: how much errors of output features count in a Hessian fit; None is 1 each.
        prepare: derives from an input what the method alternating needs of it; one that remembers
            saves that work for linears of one input.

    Returns:
        The quantised linear, on the CPU.

    Raises:
        SvskFormatError: K is not a multiple of the group size.
        SvskError: a weight is not finite in the scales' dtype, which is the model's, or the
            statistics cannot be used.
    """
    weight = weight.float()
    spec = LinearSpec(name, weight.shape[0], weight.shape[1], scheme, scale_dtype)
    # A group whose scale overflows would be stored as zeros.
    require_finite(weight, spec)
    moment = statistics.second_moment
    if isinstance(recipe, PublishedRecipe):
        seed = recipe.calibration.seed
        linear = _quantize_published(weight, moment, spec, recipe.published, seed)
    else:
        given = prepare(statistics, recipe.alternating, recipe.sink_weight(name))
        linear = quantize_alternating(weight, given, spec, metric)
    return _to_cpu(linear)


def _quantize_published(
    weight: torch.Tensor, moment: torch.Tensor, spec: LinearSpec, args: PublishedArgs, seed: int
) -> QuantizedLinear:
    """Activation-aware rounding, then a sidecar under the diagonal weighting."""
    importance = channel_importance(moment, args.alpha, args.importance_clip)
    codebook = spec.scheme.weights.codebook
    codes, scale = quantize_aa(
        weight, importance, spec.group_size, codebook, spec.scales, args.clip_grid
    )
    linear = QuantizedLinear(spec, codes, scale)
    if not spec.rank:
        return linear
    side = fit_diagonal_sidecar(
        weight - dequantize(linear),
        moment,
        spec.grid,
        spec.rank,
        spec.factor_bits,
        args.ridge,
        seed,
    )
    return QuantizedLinear(spec, codes, scale, side.u, side.v, side.gain)


def _to_cpu(linear: QuantizedLinear) -> QuantizedLinear:
    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cpu()

    return QuantizedLinear(
        linear.spec,
        linear.codes.cpu(),
        linear.scale.cpu(),
        move(linear.u),
        move(linear.v),
        move(linear.gain),
    )
