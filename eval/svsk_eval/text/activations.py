# SPDX-License-Identifier: Apache-2.0
"""Activations of few bits, emulated: inputs of a model's linears are rounded as kernels would.

Weights stay as they are, and products are computed in the model's own dtype: what is measured is
the rounding alone. The sidecar of an SVSK checkpoint reads rounded inputs as the base does, since a
dequantised weight no longer tells the two apart.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from svsk_eval.errors import EvalError
from svsk_offline.storage.decoder_blocks import decoder_blocks, linear_modules

__all__ = ["ACTIVATIONS", "Activations", "check_kind", "rounded_inputs"]

_INT8_LARGEST: Final = 127
_E4M3_LARGEST: Final = float(torch.finfo(torch.float8_e4m3fn).max)
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the 4-bit floats of NVFP4: two bits of exponent, one of mantissa."""
_NVFP4_BLOCK: Final = 16


def _int8(rows: torch.Tensor) -> torch.Tensor:
    """``s * round(x / s)``, s the largest magnitude of the last axis over 127, to even ones."""
    scale = _unless_zero(rows.abs().amax(-1, keepdim=True) / _INT8_LARGEST)
    return (rows / scale).round() * scale


def _fp8(rows: torch.Tensor) -> torch.Tensor:
    """E4M3 under one scale per token, its largest magnitude over 448."""
    scale = _unless_zero(rows.abs().amax(-1, keepdim=True) / _E4M3_LARGEST)
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    """E2M1 under an E4M3 scale per 16 channels, those under one float32 scale of the tensor.

    NVIDIA's two levels: the tensor's scale puts its largest magnitude at 6 * 448, a block's scale,
    rounded to E4M3, the block's largest at 6. The tensor is what the model is given at a time, a
    chunk of text; an engine would have the scale from calibration.
    """
    top = _E2M1[-1]
    whole = _unless_zero(blocks.abs().amax() / (top * _E4M3_LARGEST))
    wanted = blocks.abs().amax(-1, keepdim=True) / top / whole
    scale = wanted.to(torch.float8_e4m3fn).float() * whole
    # A block far below the tensor's largest has a scale of zero, and is zero.
    steps = torch.where(scale == 0, 0.0, blocks / scale)
    levels = torch.tensor(_E2M1, device=blocks.device)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = steps.abs()
    index = torch.bucketize(magnitude, middles)  # of a tie the lower level
    # Levels alternate between an even and an odd mantissa, ties go to the even one.
    tie = magnitude == middles[index.clamp_max(len(middles) - 1)]
    index += (tie & (index % 2 == 1)).long()
    return torch.copysign(levels[index], steps) * scale


def _unless_zero(scale: torch.Tensor) -> torch.Tensor:
    return scale.where(scale > 0, 1)


@dataclass(frozen=True)
class Activations:
    """A kind of stored activation.

    Attributes:
        meaning: in a few words.
        block: channels that are rounded together, 0 for all of a token.
        round: rounds float32 [..., block].
    """

    meaning: str
    block: int
    round: Callable[[torch.Tensor], torch.Tensor]

    def rounded(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs as they would be stored.

        Args:
            inputs: float [..., K], K a multiple of :attr:`block`.

        Returns:
            The same shape and dtype.
        """
        blocks = inputs.float().unflatten(-1, (-1, self.block or inputs.shape[-1]))
        return self.round(blocks).flatten(-2).to(inputs)


ACTIVATIONS: Final[Mapping[str, Activations]] = {
    "int8": Activations("8-bit integers, a scale per token", 0, _int8),
    "int8-g64": Activations("8-bit integers, a scale per token and 64 channels", 64, _int8),
    "fp8": Activations("E4M3 floats, a scale per token", 0, _fp8),
    "nvfp4": Activations("E2M1 floats, a scale per token and 16 channels", _NVFP4_BLOCK, _nvfp4),
}
"""By name. ``int8-g64`` is what the CPU kernel multiplies with ``SVSK_ACTIVATIONS=int8``."""


def check_kind(kind: str) -> None:
    """Refuse what is no key of :data:`ACTIVATIONS`.

    Raises:
        EvalError: it is none.
    """
    if kind not in ACTIVATIONS:
        raise EvalError(f"--activations {kind}: expected one of {', '.join(ACTIVATIONS)}.")


@contextmanager
def rounded_inputs(model: Any, folder: Path, kind: str) -> Iterator[None]:
    """Have a model round the inputs of its decoder blocks' linears, while the context lasts.

    Args:
        model: a causal language model of transformers.
        folder: it comes from, for errors.
        kind: a key of :data:`ACTIVATIONS`.

    Raises:
        EvalError: there is no such kind, or an input has channels that it cannot divide.
    """
    check_kind(kind)
    how = ACTIVATIONS[kind]

    def before(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return how.rounded(given[0]), *given[1:]

    linears = dict(linear_modules(decoder_blocks(model, folder)[1]))
    for name, linear in linears.items():
        if how.block and linear.in_features % how.block:
            raise EvalError(
                f"--activations {kind}: {name} has {linear.in_features} inputs, which is no"
                f" multiple of {how.block}. Choose int8 or fp8."
            )
    hooks = [linear.register_forward_pre_hook(before) for linear in linears.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
