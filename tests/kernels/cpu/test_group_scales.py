# SPDX-License-Identifier: Apache-2.0
"""Kernels for processors with every form of a group's scale, on shapes that fill no block."""

from typing import Any

import pytest
import torch

from svsk_kernels.cpu.cpu_kernel import CpuKernel, cpu_ops_obstacle
from svsk_kernels.cpu.portable_kernel import PortableKernel
from svsk_kernels.naive import naive_matmul
from svsk_vllm.format import Codebook, LinearSpec
from svsk_vllm.format.group_scales import ScaleBits
from tests.support.cpu_paths import PATHS
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer

BOUND = {torch.bfloat16: 3.5e-3, torch.float16: 4e-4, torch.float32: 2e-6}
"""Rounding of the result, and in bfloat16 of z where the sidecar is most of it."""
FUSED = pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
KERNELS = [
    pytest.param("", id="portable"),
    *(pytest.param(*path.values, marks=(FUSED, *path.marks)) for path in PATHS),
]
"""The portable kernel, and the other one's instructions."""


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("instructions", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize("bits", [16, 8, 6])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_layer_equals_reference(
    group_size: int,
    bits: ScaleBits,
    codebook: Codebook,
    rank: int,
    dtype: torch.dtype,
    instructions: str,
) -> None:
    """From one row of activations to more than are multiplied together."""
    group = make_group(
        group_size=group_size, scale_bits=bits, codebook=codebook, rank=rank, tile_m=40, tile_n=100
    )
    source = random_linear(LinearSpec("m", 75, 192, group, dtype))
    spec, layer = loaded_layer(source, dtype)
    assert spec.row_scaled == (bits != 16)
    if instructions == "avx512_bf16" and dtype == torch.float32:
        pytest.skip("that path takes no float32")
    kernel: Any = CpuKernel(spec) if instructions else PortableKernel(spec)
    if instructions:
        kernel.instructions = instructions
    kernel.prepare(layer)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(75, generator=generator).to(dtype)
    for rows in (1, 3, 17):
        x = torch.randn(rows, 192, generator=generator).to(dtype)
        expected = naive_matmul(x, source.plain, bias)
        assert error(kernel(layer, x, bias), expected) < BOUND[dtype]
        assert error(kernel(layer, x, None), naive_matmul(x, source.plain)) < BOUND[dtype]


@pytest.mark.parametrize("bits", [8, 6])
def test_float32_is_exact_with_either_level(bits: ScaleBits) -> None:
    group = make_group(group_size=16, scale_bits=bits, rank=5, tile_m=40, tile_n=72)
    source = random_linear(LinearSpec("m", 75, 192, group))
    spec, layer = loaded_layer(source, torch.float32)
    kernel = PortableKernel(spec)
    kernel.prepare(layer)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    found = kernel(layer, x, None)
    assert error(found, naive_matmul(x, source.plain)) < BOUND[torch.float32]


@FUSED
@pytest.mark.parametrize(("group_size", "bytes_per_group"), [(16, 9), (32, 17)])
def test_codes_of_scales_stay_bytes(group_size: int, bytes_per_group: int) -> None:
    group = make_group(group_size=group_size, scale_bits=8)
    spec, layer = loaded_layer(random_linear(LinearSpec("m", 64, 512, group)), torch.bfloat16)
    CpuKernel(spec).prepare(layer)
    held = sum(tensor.nbytes for tensor in layer.parameters())
    assert held == 64 * 512 // group_size * bytes_per_group + 64 * 2
