# SPDX-License-Identifier: Apache-2.0
"""Quantising one linear layer, and how well it went."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from svsk_offline.calibration.capture import InputMoments
from svsk_offline.quantizers import channel_importance, fit_diagonal_sidecar, quantize_aa
from svsk_offline.recipe import Recipe
from svsk_vllm.format import ConfigGroup, LinearSpec, QuantizedLinear, dequantize

__all__ = ["LayerReport", "quantize_linear", "weighted_error"]


@dataclass(frozen=True)
class LayerReport:
    """One line of the tool's output."""

    name: str
    shape: Sequence[int]  # N, K
    num_weights: int
    stored_bits: int
    base_error: float  # relative weighted error of the base alone
    error: float  # relative weighted error with the sidecar
    sqnr_db: float
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.stored_bits / self.num_weights


def weighted_error(weight: torch.Tensor, approximation: torch.Tensor, second_moment: torch.Tensor) -> float:
    """``sum_ij d_j (W - W_hat)_ij^2 / sum_ij d_j W_ij^2`` with ``d_j = E[x_j^2]``; 0 for a layer that is never used."""
    energy = float((weight.square() @ second_moment).sum())
    return float(((weight - approximation).square() @ second_moment).sum()) / energy if energy else 0.0


def quantize_linear(
    name: str,
    weight: torch.Tensor,
    moments: InputMoments,
    recipe: Recipe,
    scheme: ConfigGroup,
    scale_dtype: torch.dtype,
) -> tuple[QuantizedLinear, LayerReport]:
    """Quantise one weight by a recipe.

    Args:
        name: Hugging Face module name.
        weight: [N, K], any floating dtype.
        moments: statistics of the layer's input.
        recipe: how.
        scheme: group size, codebook, sidecar shape.
        scale_dtype: stored dtype of the scales.

    Returns:
        The quantised linear on the CPU, and its report.

    Raises:
        SvskFormatError: K is not a multiple of the group size.
    """
    started = time.perf_counter()
    weight = weight.float()
    spec = LinearSpec(name, weight.shape[0], weight.shape[1], scheme, scale_dtype)
    moment = moments.second_moment
    importance = channel_importance(moment, recipe.base.alpha, recipe.base.importance_clip)
    codes, scale = quantize_aa(
        weight, importance, spec.group_size, scheme.weights.codebook, scale_dtype, recipe.base.clip_grid
    )
    linear = QuantizedLinear(spec, codes, scale)
    base = dequantize(linear)
    base_error = weighted_error(weight, base, moment)
    approximation, error = base, base_error
    if spec.rank:
        side = fit_diagonal_sidecar(
            weight - base, moment, spec.grid, spec.rank, spec.factor_bits, recipe.fit.ridge, recipe.calibration.seed
        )
        linear = QuantizedLinear(spec, codes, scale, side.u, side.v, side.gain)
        approximation = dequantize(linear)
        error = weighted_error(weight, approximation, moment)
    noise = float((weight - approximation).square().sum())
    sqnr = 10 * float(torch.log10(weight.square().sum() / noise)) if noise else float("inf")
    report = LayerReport(
        name, (spec.n, spec.k), spec.num_weights, spec.stored_bits, base_error, error, sqnr,
        time.perf_counter() - started,
    )  # fmt: skip
    return _to_cpu(linear), report


def _to_cpu(linear: QuantizedLinear) -> QuantizedLinear:
    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cpu()

    return QuantizedLinear(
        linear.spec, linear.codes.cpu(), linear.scale.cpu(), move(linear.u), move(linear.v), move(linear.gain)
    )
