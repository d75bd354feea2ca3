# SPDX-License-Identifier: Apache-2.0
"""Keys with a scale per channel: 32 tokens of a channel share one, and a minimum.

Some channels of keys are tens of times larger than the others, at every token; biases on k and
rotary pairs that hardly turn make them. A scale along the head gives the small channels of such a
head no levels. Along the tokens each channel has its own (KIVI, arXiv 2402.02750, section 3), at 4
bits a number and 32 bits per 32 numbers: 5 bits.
"""

from typing import Final, NamedTuple

import torch

from svsk_kernels.errors import SvskError

__all__ = ["TOKENS", "ChannelBlocks", "pack_channels", "unpack_channels"]

TOKENS: Final = 32
"""Of a block."""

_LEVELS: Final = 15
"""Steps between the least and the largest code."""


class ChannelBlocks(NamedTuple):
    """n blocks of 32 tokens of d channels; x = scale * code + minimum.

    Attributes:
        packed: uint8 [..., n, 16, d]; byte j of a channel holds the code of token j of the block in
            its low half, of token j + 16 in its high half.
        scale: float16 [..., n, 1, d].
        minimum: float16 [..., n, 1, d].
    """

    packed: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


def pack_channels(keys: torch.Tensor) -> ChannelBlocks:
    """Store keys with a scale per channel.

    Codes are the nearest to each key under the scale and minimum as they are stored, in fp16.

    Args:
        keys: float [..., 32 n, d].

    Raises:
        SvskError: a key is not finite, or beyond what fp16 holds.
    """
    blocks = keys.float().unflatten(-2, (keys.shape[-2] // TOKENS, TOKENS))
    low, high = blocks.aminmax(dim=-2, keepdim=True)
    scale, minimum = ((high - low) / _LEVELS).half(), low.half()
    if not (scale.isfinite().all() and minimum.isfinite().all()):
        raise SvskError(
            f"Keys between {float(low.min()):g} and {float(high.max()):g}: expected finite keys"
            " within fp16, whose scales and minimums the blocks store. Take kind int4, or q8_0."
        )
    step = scale.float()
    codes = ((blocks - minimum.float()) / step).round().clamp(0, _LEVELS)
    # equal keys, or too close for a fp16 scale: all are the minimum
    codes = torch.where(step > 0, codes, 0).to(torch.uint8)
    early, late = codes.chunk(2, dim=-2)
    return ChannelBlocks(early | (late << 4), scale, minimum)


def unpack_channels(blocks: ChannelBlocks, dtype: torch.dtype) -> torch.Tensor:
    """Keys that were stored, [..., 32 n, d] of ``dtype``; computed in float32."""
    codes = torch.cat((blocks.packed & 15, blocks.packed >> 4), dim=-2)
    keys = codes.float() * blocks.scale.float() + blocks.minimum.float()
    return keys.to(dtype).flatten(-3, -2)
