# SPDX-License-Identifier: Apache-2.0
"""A quantised linear in GGUF's blocks of 32 weights, bit for bit.

ggml-quants.c of llama.cpp defines them. Q4_0: a float16 ``d`` and 16 bytes, of which byte j holds
weight j in its low nibble and weight j + 16 in its high one; a weight is ``d * (nibble - 8)``.
Q8_0: ``d`` and 32 signed bytes; a weight is ``d * byte``.
"""

from typing import Final

import torch

from svsk_kernels.codebook import CODE_MIN, code_values
from svsk_kernels.errors import SvskError
from svsk_vllm.format import Codebook, QuantizedLinear

__all__ = ["BLOCK", "BLOCK_BYTES", "TYPE_OF", "pack_blocks"]

BLOCK: Final = 32
"""Weights per block of either type."""
TYPE_OF: Final[dict[Codebook, str]] = {"int4": "Q4_0", "quad8": "Q8_0", "int8": "Q8_0"}
"""Name of the GGUF type that holds a codebook's levels exactly."""
BLOCK_BYTES: Final = {"Q4_0": 2 + BLOCK // 2, "Q8_0": 2 + BLOCK}
_QUAD8_UNIT: Final = 8
"""quad8's levels are ``q (8 + |q|) / 8``: eight times one is an integer from -128 to 105."""


def pack_blocks(linear: QuantizedLinear) -> torch.Tensor:
    """The base of a linear as GGUF stores it.

    Args:
        linear: K a multiple of 32. Its sidecar is left out.

    Returns:
        uint8 [N, K / 32 * bytes of a block], of type ``TYPE_OF[joined_codebook]``: of a table with
        hot rows all are of 8 bits, which hold the others' codes of 4 exactly.

    Raises:
        SvskError: the blocks cannot hold the weight exactly: two scales meet in a block, or
            float16 does not hold a scale.
    """
    codebook = linear.spec.scheme.weights.joined_codebook
    n, k = linear.codes.shape
    if k % BLOCK:
        raise SvskError(
            f"{linear.spec.name}: {k} columns are not a multiple of GGUF's blocks of {BLOCK}."
            f" Quantise with `--group-size {BLOCK}`, which leaves this linear dense, or name it in"
            " `--ignore`."
        )
    used = (linear.codes != 0).reshape(n, -1, min(BLOCK, linear.spec.group_size)).any(-1)
    scale = _block_scales(linear, used)
    if codebook == "quad8":
        scale = scale / _QUAD8_UNIT
    half = scale.to(torch.float16)
    if bad := int((half.float() != scale).sum()):
        worst = float(scale[half.float() != scale].abs().min())
        raise SvskError(
            f"{linear.spec.name}: GGUF's blocks have scales in float16, which does not hold"
            f" {bad} of {scale.numel()} exactly (such as {worst:.3g}). Leave the linear dense with"
            " `--ignore`, or export with `--to dense`."
        )
    blocks = linear.codes.reshape(n, -1, BLOCK)
    if codebook == "int4":
        nibbles = (blocks - CODE_MIN).to(torch.uint8)
        data = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    else:
        values = blocks
        if codebook == "quad8":
            values = (code_values(blocks, codebook) * _QUAD8_UNIT).to(torch.int8)
        data = values.contiguous().view(torch.uint8)
    return torch.cat((half.unsqueeze(-1).view(torch.uint8), data), -1).view(n, -1)


def _block_scales(linear: QuantizedLinear, used: torch.Tensor) -> torch.Tensor:
    """Scales float32 [N, K / 32]; 0 where all codes are 0 and any scale would do.

    Args:
        linear: the linear.
        used: bool [N, groups, or blocks where these are smaller]: whether a code is not 0.
    """
    group, scale = linear.spec.group_size, linear.scale.float()
    if group >= BLOCK:
        return scale.repeat_interleave(group // BLOCK, 1) * used
    parts, used = scale.view(len(scale), -1, BLOCK // group), used.view(*scale.shape)
    used = used.view(*parts.shape)
    # the scale of a block is that of any part with codes; the others with codes must have it too
    chosen = parts.gather(-1, used.int().argmax(-1, keepdim=True))
    if bad := int(((parts != chosen) & used).any(-1).sum()):
        raise SvskError(
            f"{linear.spec.name}: groups of {group} weights have scales of their own, GGUF's blocks"
            f" of {BLOCK} have one; they differ within {bad} of {chosen.numel()} blocks. Quantise"
            f" with `--group-size {BLOCK}` or 64, or export with `--to dense`."
        )
    return chosen.squeeze(-1) * used.any(-1)
