# SPDX-License-Identifier: Apache-2.0
"""Whether what the loaders compute is finite: scales and gains may be, their products not."""

from collections.abc import Callable
from typing import Final

import torch

from svsk_kernels.codebook import codebook_levels
from svsk_vllm.format.quantized_linear import QuantizedLinear, dequantize
from svsk_vllm.format.spec import LinearSpec
from svsk_vllm.format.suffixes import SIDECAR_GAIN, WEIGHT_SCALE

__all__ = ["finite_problems", "weight_problems"]

_FACTOR_PRODUCT: Final = 128.0**2
"""Of two 8-bit factors at most. The kernels multiply the gains of 4-bit factors by it too."""
_FLOATS: Final = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Dtypes that weights are stored in; float8_e8m0fnu holds exponents."""
_FLOAT32_MAX: Final = torch.finfo(torch.float32).max


def finite_problems(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> list[str]:
    """Floating values that are not finite, or would not be in the dtype they are loaded in."""
    if tensor.dtype not in _FLOATS or not tensor.numel():
        return []
    # torch.isfinite lacks float8; a float64 must not be narrowed before it is looked at
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if bad := int((~torch.isfinite(wide)).sum()):
        return [f"{name}: {bad} of {tensor.numel()} values are not finite."]
    if dtype is not None and not torch.isfinite(wide.abs().max().to(dtype)):
        return [
            f"{name}: a value of {float(wide.abs().max()):.3g},"
            f" beyond what the model's {dtype} can hold."
        ]
    return []


def weight_problems(
    spec: LinearSpec,
    scale: torch.Tensor,
    gain: torch.Tensor | None,
    dtype: torch.dtype,
    read: Callable[[], QuantizedLinear],
) -> list[str]:
    """Whether ``W_hat`` is finite, in float32 on the way and in the model's dtype at the end.

    Bounds decide for any sane checkpoint, whose weights are nowhere near the limits; the weight
    itself is computed only where they do not.

    Args:
        spec: the linear.
        scale: [N, K / g], as stored.
        gain: float32 [A, B, r], or None without a sidecar.
        dtype: the model's.
        read: reads the whole linear.
    """
    name = spec.name
    problems = finite_problems(f"{name}.{WEIGHT_SCALE}", scale, dtype)
    if gain is not None:
        problems += finite_problems(f"{name}.{SIDECAR_GAIN}", gain)
    if problems or not scale.numel():
        return problems
    level = float(codebook_levels(spec.scheme.weights.joined_codebook).abs().max())
    base = float(scale.abs().max().double()) * level
    side = (
        float(gain.double().abs().sum(-1).max()) * _FACTOR_PRODUCT
        if gain is not None and gain.numel()
        else 0.0
    )
    culprit, value = (
        (WEIGHT_SCALE, base / level) if base >= side else (SIDECAR_GAIN, side / _FACTOR_PRODUCT)
    )
    what = f"{name}.{culprit}: values that add up to {value:.3g} give weights beyond what"
    if base + side > _FLOAT32_MAX:
        return [f"{what} float32 can hold. The file is damaged: copy or download it again."]
    if base + side > torch.finfo(dtype).max and not torch.isfinite(
        dequantize(read()).abs().max().to(dtype)
    ):
        return [
            f"{what} the model's {dtype} can hold. The file is damaged: copy or download it again."
        ]
    return []
