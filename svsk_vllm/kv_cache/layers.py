# SPDX-License-Identifier: Apache-2.0
"""Layers of a transformers cache that hand attention what they stored, from the first token on.

transformers' own ``QuantizedLayer.update`` returns the keys of its first call as they came, and
quantises its whole past again whenever its residual is full: one forward pass over a text shows no
loss with it at all, and what is stored of a token depends on how often that happened. Here every
token is stored once, and the queries of a prefill attend to what was stored of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache.channel_blocks import (
    TOKENS,
    ChannelBlocks,
    pack_channels,
    unpack_channels,
)
from svsk_vllm.kv_cache.rounding import Rounding, q4_1

__all__ = ["PerChannelKeys", "RoundedLayer"]

_STORED = ("packed", "scale", "minimum", "keys", "values")


class RoundedLayer(DynamicLayer):
    """Keys and values stored token by token, kept as the floats that are read back.

    All else is ``DynamicLayer``: a token's stored form depends on no other token, so that cropping,
    reordering and repeating are those of any cache.
    """

    def __init__(self, keys: Rounding, values: Rounding) -> None:
        super().__init__()
        self._round_keys, self._round_values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens, and return all that is stored.

        Args:
            key_states: float [batch, heads, tokens, d].
            value_states: float [batch, heads, tokens, d of values].
            args: of ``DynamicLayer``; not used.
            kwargs: the same.

        Raises:
            SvskError: the shape of a head does not suit the stored form, or a scale overflows.
        """
        keys = _finite("Keys", key_states, self._round_keys)
        values = _finite("Values", value_states, self._round_values)
        stored: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values)
        return stored


class PerChannelKeys(DynamicLayer):
    """Keys in 4 bits with a scale per channel and 32 tokens; values stored token by token.

    The last tokens, fewer than 32, wait as they came until their block is full. So queries of a
    prefill attend to stored keys, of the last tokens excepted, and a model that generates attends
    to the newest as they are.

    Attributes:
        packed: uint8 [batch, heads, blocks, 16, d], see :class:`ChannelBlocks`.
        scale: float16 [batch, heads, blocks, 1, d].
        minimum: float16 [batch, heads, blocks, 1, d].
        keys: the tokens that wait, [batch, heads, fewer than 32, d] in the model's dtype.
        values: float [batch, heads, tokens, d of values], as they are read back.
    """

    is_croppable = False
    """transformers asks whether ``crop`` leaves no trace.

    Inside a block it does, see :meth:`crop`.
    """

    def __init__(self, values: Rounding = q4_1) -> None:
        super().__init__()
        self._round_values = values
        self.packed: Any = None
        self.scale: Any = None
        self.minimum: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin with no token, in the shapes and on the device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        shape = list(key_states.shape[:-2])
        channels = key_states.shape[-1]
        self.packed = key_states.new_empty((*shape, 0, TOKENS // 2, channels), dtype=torch.uint8)
        self.scale = key_states.new_empty((*shape, 0, 1, channels), dtype=torch.float16)
        self.minimum = self.scale.clone()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens, and return all that is stored.

        Args:
            key_states: float [batch, heads, tokens, d].
            value_states: float [batch, heads, tokens, d of values].
            args: of ``DynamicLayer``; not used.
            kwargs: the same.

        Raises:
            SvskError: a key is not finite or beyond fp16, or values do not suit their stored form.
        """
        values = _finite("Values", value_states, self._round_values)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        waiting = torch.cat((self.keys, key_states), dim=-2)
        full = waiting.shape[-2] // TOKENS * TOKENS
        if full:
            new = pack_channels(waiting[..., :full, :])
            for name, blocks in zip(ChannelBlocks._fields, new, strict=True):
                setattr(self, name, torch.cat((getattr(self, name), blocks), dim=-3))
        # a copy, or the few that wait would keep the memory of all
        self.keys = waiting[..., full:, :].clone()
        self.values = torch.cat((self.values, values), dim=-2)
        return self.stored_keys(), self.values

    def stored_keys(self) -> torch.Tensor:
        """What attention gets, [batch, heads, tokens, d] in the model's dtype."""
        blocks = ChannelBlocks(self.packed, self.scale, self.minimum)
        return torch.cat((unpack_channels(blocks, self.dtype), self.keys), dim=-2)

    def get_seq_length(self) -> int:
        """Tokens that are stored, those that wait included."""
        if not self.is_initialized:
            return 0
        return int(self.packed.shape[-3]) * TOKENS + int(self.keys.shape[-2])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        What is left of a block that is cut waits as it was stored, since the keys as they came are
        gone, and is stored once more when the block is full again.

        Args:
            tokens_to_remove: minus their number; or, as transformers still takes it, the number of
                tokens to keep.
        """
        length = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        if keep >= length:
            return
        blocks, rest = divmod(keep, TOKENS)
        if blocks < self.packed.shape[-3]:
            self.keys = self.stored_keys()[..., blocks * TOKENS : keep, :].clone()
            for name in ChannelBlocks._fields:
                setattr(self, name, getattr(self, name)[..., :blocks, :, :])
        else:
            self.keys = self.keys[..., :rest, :]
        self.values = self.values[..., :keep, :]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each place of the batch the tokens of another, ``beam_idx`` int64 [batch]."""
        self._each(lambda stored: stored.index_select(0, beam_idx.to(stored.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._each(lambda stored: stored.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences of the batch, by index or by mask."""
        self._each(lambda stored: stored[indices, ...])

    def offload(self) -> None:
        """Move all that is stored to the CPU."""
        self._each(lambda stored: stored.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move it back to where the model is."""
        self._each(lambda stored: stored.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything."""
        for name in _STORED:
            setattr(self, name, None)
        self.is_initialized = False

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change every tensor that is stored; their first axis is the batch."""
        if self.is_initialized:
            for name in _STORED:
                setattr(self, name, change(getattr(self, name)))


def _finite(what: str, states: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Round, and refuse what the stored form cannot hold."""
    rounded = rounding(states)
    if not rounded.isfinite().all():
        raise SvskError(
            f"{what} up to {float(states.abs().max()):g} in magnitude: expected finite numbers"
            " whose scales fit fp16. Take kind raw or int4, and check the model with --dtype"
            " float32."
        )
    return rounded
