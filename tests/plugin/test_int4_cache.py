# SPDX-License-Identifier: Apache-2.0
"""``svsk eval --kv int4`` rotates as vLLM's ``int4_per_token_head`` does."""

import numpy as np
import pytest
import torch

from svsk_vllm.kv_cache.rounding import int4
from tests.kv_cache.plain import plain_int4_codes

vllm_int4 = pytest.importorskip(
    "vllm.v1.attention.ops.int4_per_token_head", reason="this vLLM has no such cache"
)


@pytest.mark.parametrize("width", [64, 96])
def test_the_rotation_is_vllms(width: int) -> None:
    numbers = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(2))
    numbers[..., 3] = numbers[..., 3] * 40 + 150
    turned = vllm_int4.single_rht(numbers.clone()).flatten(0, 1).float()
    codes = torch.from_numpy(np.array([plain_int4_codes(row) for row in turned.numpy()]))
    size = width & -width
    expected = vllm_int4.single_rht(codes, inverse=True) / size
    error = (int4(numbers).flatten(0, 1) - expected).abs()
    assert float((error > 1e-3).any(-1).float().mean()) < 0.1
    assert float((expected - numbers.flatten(0, 1)).abs().mean()) < 10
