# SPDX-License-Identifier: Apache-2.0
"""The layers of a cache: what they hand out is what they stored, at every length and every way."""

import random

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache.layers import PerChannelKeys, RoundedLayer
from svsk_vllm.kv_cache.rounding import int4, q4_0, q4_1, raw
from tests.kv_cache.plain import plain_cache

LENGTH = 100
BATCH, HEADS, WIDTH = 2, 3, 32


def make(seed: int, tokens: int = LENGTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator)
    states[..., 5] = states[..., 5] + 60
    return states.to(dtype)


def expected_at(length: int, keys: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Whole blocks as stored, the rest as it came."""
    full = length // 32 * 32
    return torch.cat((stored[..., :full, :], keys[..., full:length, :]), -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_length_at_once_in_parts_and_token_by_token(dtype: torch.dtype) -> None:
    keys, values = make(0, dtype=dtype), make(1, dtype=dtype)
    stored, rounded = plain_cache(keys), q4_1(values)
    assert not torch.equal(stored[..., :32, :], keys[..., :32, :]), "a case that shows nothing"
    rng = random.Random(0)
    steps = PerChannelKeys()
    for length in range(1, LENGTH + 1):
        expected = expected_at(length, keys, stored), rounded[..., :length, :]
        whole = PerChannelKeys()
        given = whole.update(keys[..., :length, :], values[..., :length, :])
        assert all(map(torch.equal, given, expected)), length
        cuts = sorted(rng.randint(0, length) for _ in range(3))
        parts = PerChannelKeys()
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            given = parts.update(keys[..., start:stop, :], values[..., start:stop, :])
            assert parts.get_seq_length() == stop
        assert all(map(torch.equal, given, expected)), (length, cuts)
        new = slice(length - 1, length)
        given = steps.update(keys[..., new, :], values[..., new, :])
        assert all(map(torch.equal, given, expected)), length
        assert given[0].dtype == given[1].dtype == dtype
        for layer in (whole, parts, steps):
            assert layer.get_seq_length() == length
            assert layer.get_mask_sizes(7) == (length + 7, 0)


def test_memory_is_that_of_the_blocks() -> None:
    layer = PerChannelKeys()
    layer.update(make(0, 4096), make(1, 4096))
    kept = (layer.packed, layer.scale, layer.minimum, layer.keys)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    assert size * 8 == 5 * BATCH * HEADS * 4096 * WIDTH
    layer.update(make(2, 1), make(3, 1))
    assert layer.keys.untyped_storage().nbytes() == 4 * BATCH * HEADS * WIDTH


def test_crop_to_every_length_and_on() -> None:
    keys, values, more = make(0), make(1), make(2, 50)
    stored, rounded = plain_cache(keys), q4_1(values)
    for keep in range(LENGTH):
        for crop in (keep - LENGTH, keep):
            if crop == 0:  # of -0 tokens nothing is left out, and the length 0 cannot be said
                continue
            layer = PerChannelKeys()
            layer.update(keys, values)
            layer.crop(crop)
            assert layer.get_seq_length() == keep
            # block 3 waits as it came; a block that is cut waits as it was stored
            left = expected_at(LENGTH, keys, stored)[..., :keep, :]
            assert torch.equal(layer.stored_keys(), left)
            full = keep // 32 * 32
            after = torch.cat((left[..., full:, :], more), -2)
            expected = torch.cat((left[..., :full, :], plain_cache(after)), -2)
            given = layer.update(more, more)
            assert torch.equal(given[0], expected), keep
            assert torch.equal(given[1], torch.cat((rounded[..., :keep, :], q4_1(more)), -2))


@pytest.mark.parametrize("length", [100, 64, 7])
def test_crop_of_nothing_and_of_all(length: int) -> None:
    layer = PerChannelKeys()
    keys, _ = layer.update(make(0, length), make(1, length))
    for crop in (0, length, length + 9):
        layer.crop(crop)
        assert torch.equal(layer.stored_keys(), keys)
    layer.crop(-length - 3)
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(make(0, length), make(1, length))[0], keys)


@pytest.mark.parametrize("length", [100, 64, 7])
def test_the_batch_is_reordered_repeated_and_selected(length: int) -> None:
    keys, values, more = make(0, length), make(1, length), make(2, 40)
    for change, same in (
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), lambda x: x[[1, 1]]),
        (lambda layer: layer.batch_repeat_interleave(2), lambda x: x[[0, 0, 1, 1]]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), lambda x: x[[1]]),
        (lambda layer: layer.batch_select_indices(torch.tensor([True, False])), lambda x: x[[0]]),
        (lambda layer: (layer.offload(), layer.prefetch()), lambda x: x),
    ):
        layer, other = PerChannelKeys(), PerChannelKeys()
        change(layer)  # of nothing
        layer.update(keys, values)
        change(layer)
        other.update(same(keys), same(values))
        given, expected = layer.update(same(more), same(more)), other.update(same(more), same(more))
        assert all(map(torch.equal, given, expected))


def test_reset_forgets() -> None:
    layer = PerChannelKeys()
    layer.update(make(0), make(1))
    layer.reset()
    assert layer.get_seq_length() == 0
    given = layer.update(make(2, 40)[:1], make(3, 40)[:1])
    assert torch.equal(given[0], plain_cache(make(2, 40)[:1]))


def test_keys_and_values_of_other_widths() -> None:
    layer = PerChannelKeys(raw)
    keys, values = make(0)[..., :24], make(1)
    given = layer.update(keys, values)
    assert torch.equal(given[0], plain_cache(keys))
    assert torch.equal(given[1], values)


def test_token_by_token_forms_are_those_of_the_tokens() -> None:
    keys, values = make(0), make(1)
    layer, plain = RoundedLayer(q4_0, int4), DynamicLayer()
    for start in range(0, LENGTH, 30):
        part = slice(start, min(start + 30, LENGTH))
        given = layer.update(keys[..., part, :], values[..., part, :])
        expected = plain.update(q4_0(keys)[..., part, :], int4(values)[..., part, :])
        assert all(map(torch.equal, given, expected))
    assert layer.get_seq_length() == LENGTH
    layer.crop(-41)
    assert torch.equal(
        layer.update(keys[..., :1, :], values[..., :1, :])[0][..., :59, :], q4_0(keys)[..., :59, :]
    )


def test_numbers_that_no_scale_holds_are_refused() -> None:
    large = make(0) * 1e6
    with pytest.raises(SvskError, match=r"Values up to .*e\+0. in magnitude: expected finite"):
        PerChannelKeys().update(make(0), large)
    with pytest.raises(SvskError, match="Keys up to"):
        RoundedLayer(q4_0, raw).update(large, make(1))
    with pytest.raises(SvskError, match="Keys between"):
        PerChannelKeys().update(large, make(1))
    broken = make(0)
    broken[0, 0, 99, 0] = float("nan")
    with pytest.raises(SvskError, match="Keys up to nan"):
        RoundedLayer(int4, int4).update(broken, make(1))
