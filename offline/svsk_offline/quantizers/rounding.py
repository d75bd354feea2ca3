# SPDX-License-Identifier: Apache-2.0
"""Rounding weights to codes, given scales."""

import torch

from svsk_kernels.errors import SvskError
from svsk_vllm.format import CODE_MAX, CODE_MIN, Codebook, LinearSpec, code_values, codebook_levels

__all__ = [
    "absmax_scale",
    "nearest_codes",
    "nearest_indices",
    "nearest_integers",
    "nearest_levels",
    "require_finite",
    "scaled_codes",
]


def nearest_indices(ratio: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Like :func:`nearest_codes`, but the codes stay floating: for inner loops.

    The threshold between the ``quad8`` levels of codes q and q + 1 (q >= 0) is ``(v(q) + v(q + 1))
    / 2 = v(q + 1/2) + 1/32``, so rounding the inverse of v at ``|x| - 1/32`` finds the nearest
    level exactly.
    """
    if codebook == "quad8":
        # 15.75 = 16 - 8 / 32: the inverse of v(q) = q (8 + q) / 8 is sqrt(8 x + 16) - 4.
        ratio = torch.copysign((ratio.abs() * 8 + 15.75).sqrt_().sub_(4), ratio)
    return nearest_integers(ratio, CODE_MIN, CODE_MAX)


def nearest_integers(ratio: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Nearest integer of a range, halves to the even one; float32 of the same shape."""
    return ratio.round().clamp_(low, high)


def nearest_levels(ratio: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Level nearest to each ratio, in units of the scale; float32 of the same shape."""
    return code_values(nearest_indices(ratio, codebook), codebook)


def nearest_codes(ratio: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Code of the level nearest to each weight-to-scale ratio.

    Args:
        ratio: float, any shape.
        codebook: the 16 levels.

    Returns:
        int8 of the same shape, values in [-8, 7].
    """
    return nearest_indices(ratio, codebook).to(torch.int8)


def absmax_scale(groups: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Scale that puts each group's largest magnitude on the highest level.

    Args:
        groups: float32 [..., g].
        codebook: its highest level is 7 (``int4``) or 13.125 (``quad8``).

    Returns:
        float32 [...], not yet rounded to a stored dtype.
    """
    return groups.abs().amax(-1) / float(codebook_levels(codebook)[-1])


def scaled_codes(
    groups: torch.Tensor, scale: torch.Tensor, codebook: Codebook
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of grouped weights under given scales, and the values they stand for.

    A scale of zero (a group of zeros, or one so small that its scale underflows) gives code 0 and
    value 0.

    Args:
        groups: float32 [..., g].
        scale: float32 [...], already rounded to the stored dtype.
        codebook: the 16 levels.

    Returns:
        int8 codes and float32 values, both of the shape of ``groups``.
    """
    usable = torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(-1)
    codes = nearest_codes(
        torch.where(scale.unsqueeze(-1) == 0, torch.zeros_like(groups), groups / usable), codebook
    )
    return codes, code_values(codes, codebook) * scale.unsqueeze(-1)


def require_finite(weight: torch.Tensor, spec: LinearSpec) -> None:
    """Refuse weights that the model could not have in the dtype of their scales.

    Args:
        weight: some of the weights, any floating dtype.
        spec: of the whole.

    Raises:
        SvskError: one is not finite there.
    """
    if not bool(torch.isfinite(weight.to(spec.scale_dtype)).all()):
        raise SvskError(
            f"{spec.name}.weight: holds values that are not finite in {spec.scale_dtype}. The"
            " model is damaged, or needs --dtype bfloat16."
        )
