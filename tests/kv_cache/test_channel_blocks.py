# SPDX-License-Identifier: Apache-2.0
"""Keys with a scale per channel, against the same arithmetic written plainly."""

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache.channel_blocks import pack_channels, unpack_channels
from tests.kv_cache.plain import plain_block


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    numbers[..., 1] = numbers[..., 1] * 0.01 + 215
    return numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_the_plain_ones(dtype: torch.dtype) -> None:
    numbers = keys(2, 3, 96, 5).to(dtype)
    blocks = pack_channels(numbers)
    assert (blocks.packed.dtype, blocks.packed.shape) == (torch.uint8, (2, 3, 3, 16, 5))
    assert blocks.scale.shape == blocks.minimum.shape == (2, 3, 3, 1, 5)
    assert blocks.scale.dtype == blocks.minimum.dtype == torch.float16
    bits = sum(tensor.element_size() * tensor.numel() * 8 for tensor in blocks)
    assert bits == 5 * numbers.numel()
    back = unpack_channels(blocks, dtype)
    assert back.dtype == dtype
    for batch in range(2):
        for head in range(3):
            for start in (0, 32, 64):
                part = batch, head, slice(start, start + 32)
                expected = plain_block(numbers[part].float().numpy())
                assert torch.equal(back[part], torch.from_numpy(expected).to(dtype))


def test_an_error_is_half_a_step_and_what_fp16_takes() -> None:
    numbers = keys(64, 8)
    blocks = pack_channels(numbers)
    error = (unpack_channels(blocks, torch.float32) - numbers).abs().unflatten(0, (-1, 32))
    # the minimum may lie above the least key, the last level below the largest
    slack = blocks.minimum.float().abs() * 2**-11 + blocks.scale.float() * 16 * 2**-11
    assert bool((error <= blocks.scale.float() / 2 + 2 * slack).all())
    assert float(error[..., 0].mean()) > float(blocks.scale.float()[..., 0].mean()) / 5


def test_equal_keys_are_their_minimum() -> None:
    numbers = torch.full((32, 3), -1.75)
    numbers[:, 1] = 0.0
    numbers[5, 2] += 1e-9
    blocks = pack_channels(numbers)
    assert not blocks.scale.any()
    assert torch.equal(
        unpack_channels(blocks, torch.float32), blocks.minimum[0].float().expand(32, 3)
    )


def test_no_block_is_no_block() -> None:
    blocks = pack_channels(torch.zeros(2, 0, 4))
    assert unpack_channels(blocks, torch.float32).shape == (2, 0, 4)


@pytest.mark.parametrize("worst", [1e5, float("inf"), float("nan")])
def test_what_fp16_cannot_hold_is_refused(worst: float) -> None:
    numbers = keys(32, 4)
    numbers[7, 2] = -worst
    with pytest.raises(SvskError, match="expected finite keys within fp16"):
        pack_channels(numbers)
