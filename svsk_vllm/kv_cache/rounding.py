# SPDX-License-Identifier: Apache-2.0
"""What engines read back of keys and values that they store token by token in few bits.

Every function takes float [..., d] with d the dimension of a head, and gives the same shape and
dtype: each head of each token is stored apart from all others. The arithmetic is float32, scales
are stored as the engine stores them. Nothing is packed: these are for measuring.

- ``q8_0``, ``q4_0``, ``q4_1``: llama.cpp's block types, by ggml-quants.c (``quantize_row_*_ref``),
  bit for bit.
- ``rotated``: one of them behind the Hadamard rotation that llama.cpp puts in front of a quantised
  cache (pull request 21038, in releases since April 2026).
- ``int4``: vLLM's cache dtype ``int4_per_token_head``, by its int4_per_token_head.py.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Final

import torch

from svsk_kernels.errors import SvskError

__all__ = ["BLOCK", "Rounding", "int4", "q4_0", "q4_1", "q8_0", "raw", "rotated"]

Rounding = Callable[[torch.Tensor], torch.Tensor]

BLOCK: Final = 32
"""Channels of a block of llama.cpp's types."""

_ROTATION: Final = 64
"""Narrowest rotation of llama.cpp; heads that are no multiple of it are not rotated there."""

_SIGNS_SEED: Final = 0x9E3779B9
"""Of vLLM's random signs, the same in every process."""

_LEAST_SCALE: Final = 1e-6
"""vLLM's, so that a head of equal channels is not divided by zero."""


def raw(states: torch.Tensor) -> torch.Tensor:
    """Keys or values as the model computed them."""
    return states


def q8_0(states: torch.Tensor) -> torch.Tensor:
    """8 bits and a fp16 scale per 32 channels, 8.5 bits: x = s q, s = max|x| / 127.

    Raises:
        SvskError: d is not a multiple of 32.
    """
    blocks = _blocks(states)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(step)
    # C's roundf, halves away from zero; adding 0.5 first would round 0.49999997 up
    whole = scaled.abs().floor()
    codes = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
    return _joined(codes * _half(step), states)


def q4_0(states: torch.Tensor) -> torch.Tensor:
    """4 bits and a fp16 scale per 32 channels, 4.5 bits: x = s q, q = -8 .. 7.

    s is minus an eighth of the number of largest magnitude, which is met at -8.

    Raises:
        SvskError: d is not a multiple of 32.
    """
    blocks = _blocks(states)
    step = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    codes = (blocks * _inverse(step) + 8.5).trunc().clamp(0, 15) - 8
    return _joined(codes * _half(step), states)


def q4_1(states: torch.Tensor) -> torch.Tensor:
    """4 bits, a fp16 scale and a fp16 minimum per 32 channels, 5 bits: x = s q + m.

    Raises:
        SvskError: d is not a multiple of 32.
    """
    blocks = _blocks(states)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    codes = ((blocks - low) * _inverse(step) + 0.5).trunc().clamp(0, 15)
    return _joined(codes * _half(step) + _half(low), states)


def rotated(rounding: Rounding, states: torch.Tensor, *, whole_head: bool) -> torch.Tensor:
    """Rotate, store by ``rounding``, and rotate back, as llama.cpp does with a quantised cache.

    The queries are rotated with the keys there, and what is read of the values is rotated back:
    the same in exact arithmetic as rotating back what was stored.

    Args:
        rounding: of the rotated numbers.
        states: float [..., d].
        whole_head: rotate by the largest power of two that divides d, as keys are; else by 64, as
            values are.

    Raises:
        SvskError: d is not a multiple of 64, so that llama.cpp does not rotate.
    """
    width = states.shape[-1]
    if width % _ROTATION:
        raise SvskError(
            f"A head has {width} channels, llama.cpp rotates multiples of {_ROTATION} only. Take"
            " the kind without -rot."
        )
    size = _power_of_two_in(width) if whole_head else _ROTATION
    norm = math.sqrt(size)
    turned = rounding(_hadamard(states.float(), size) / norm)
    return (_hadamard(turned, size) / norm).to(states.dtype)


def int4(states: torch.Tensor) -> torch.Tensor:
    """4 bits, a float32 scale and a 4-bit zero per head, behind a Hadamard rotation with signs.

    x = s (q - z) of the rotated numbers; z lies in the last four bits of s, so that a number takes
    4 + 32 / d bits. z is whole and within 0 to 15: a head that does not hold zero wastes range.
    """
    size = _power_of_two_in(states.shape[-1])
    signs = _signs(size).to(states.device).repeat(states.shape[-1] // size)
    turned = _hadamard(states.float() * signs, size)
    low, high = turned.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(_LEAST_SCALE)
    zero = _away_from_zero(-low / step).clamp(0, 15)
    codes = _away_from_zero(turned * (1 / step) + zero).clamp(0, 15)
    kept = (step.view(torch.int32) & -16).view(torch.float32)
    back: torch.Tensor = _hadamard((codes - zero) * kept, size) / size * signs
    return back.to(states.dtype)


def _blocks(states: torch.Tensor) -> torch.Tensor:
    """float32 [..., d / 32, 32]."""
    if states.shape[-1] % BLOCK:
        raise SvskError(
            f"A head has {states.shape[-1]} channels, llama.cpp's types store blocks of {BLOCK}."
            " Take another kind, such as int4."
        )
    blocks: torch.Tensor = states.float().unflatten(-1, (-1, BLOCK))
    return blocks


def _joined(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.flatten(-2).to(like.dtype)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step == 0, 0.0, 1 / step)


def _half(stored: torch.Tensor) -> torch.Tensor:
    """What fp16 keeps of a scale or a minimum, as float32; infinite from 65520 on."""
    return stored.half().float()


def _away_from_zero(numbers: torch.Tensor) -> torch.Tensor:
    """vLLM's rounding: half is added towards the sign, and the fraction cut."""
    return (numbers + torch.where(numbers >= 0, 0.5, -0.5)).trunc()


def _power_of_two_in(width: int) -> int:
    """The largest power of two that divides ``width``."""
    return width & -width


@cache
def _signs(size: int) -> torch.Tensor:
    """vLLM's signs of a rotation, float32 [size] on the CPU."""
    generator = torch.Generator().manual_seed(_SIGNS_SEED)
    signs: torch.Tensor = 2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1
    return signs


def _hadamard(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix, not normalised, times each ``size`` numbers of the last axis."""
    turned: torch.Tensor = numbers.unflatten(-1, (-1, size))
    half = 1
    while half < size:
        first, second = turned.unflatten(-1, (-1, 2, half)).unbind(-2)
        turned = torch.stack((first + second, first - second), -2).flatten(-3)
        half *= 2
    return turned.flatten(-2)
