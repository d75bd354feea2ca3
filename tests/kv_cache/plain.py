# SPDX-License-Identifier: Apache-2.0
"""A cache worked out plainly: every channel of every block by itself, in numpy."""

import math

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]


def plain_block(keys: FloatArray) -> FloatArray:
    """What 32 tokens [32, d] become."""
    back = np.empty_like(keys)
    for channel in range(keys.shape[1]):
        column = keys[:, channel]
        scale = np.float32(np.float16((column.max() - column.min()) / np.float32(15)))
        minimum = np.float32(np.float16(column.min()))
        for token, key in enumerate(column):
            code = 0 if scale == 0 else np.clip(np.rint((key - minimum) / scale), 0, 15)
            back[token, channel] = np.float32(code) * scale + minimum
    return back


def plain_int4_codes(turned: FloatArray) -> FloatArray:
    """What vLLM's int4_per_token_head reads back of a rotated head [d], as its kernels write it."""
    step = max((turned.max() - turned.min()) / np.float32(15), np.float32(1e-6))
    zero = min(max(_away(-turned.min() / step), 0), 15)
    codes = [min(max(_away(float(number / step) + zero), 0), 15) for number in turned]
    # the zero lies in the last four bits of the scale
    kept = (np.array([step], np.float32).view(np.int32) & -16) | zero
    scale = (kept & -16).view(np.float32)[0]
    return ((np.array(codes) - (int(kept[0]) & 15)) * scale).astype(np.float32)


def _away(number: float) -> int:
    return int(number + math.copysign(0.5, number))


def plain_cache(keys: torch.Tensor) -> torch.Tensor:
    """Keys [batch, heads, tokens, d] as the cache gives them: whole blocks stored, the rest raw."""
    stored = keys.clone()
    for batch in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            for start in range(0, keys.shape[2] - 31, 32):
                part = batch, head, slice(start, start + 32)
                block = plain_block(keys[part].float().numpy())
                stored[part] = torch.from_numpy(block).to(keys.dtype)
    return stored
