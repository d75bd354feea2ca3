# SPDX-License-Identifier: Apache-2.0
"""The dequantised layer against the format's own definition of the weight."""

import dataclasses

import pytest
import torch

from svsk_kernel_tools.stack_linears import random_linear as plain_linear
from svsk_kernel_tools.stack_linears import stack_linears
from svsk_kernels.group_scales import expand_scales
from svsk_kernels.naive import naive_matmul
from svsk_kernels.reference_kernel import ReferenceKernel, dequantize_layer
from svsk_kernels.tile_grid import TileGrid
from svsk_vllm.format import LinearSpec, dequantize, pack_codes
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer


@pytest.mark.parametrize("codebook", ["int4", "quad8"])
def test_stacked_layer_is_its_linears_stacked(codebook: str) -> None:
    shapes = ((70, 6, 32, 0), (40, 0, 0, 0), (33, 4, 16, 40), (30, 512, 0, 0))
    linears = [
        random_linear(
            LinearSpec(
                "m",
                n,
                96,
                make_group(rank=rank, tile_m=tm, tile_n=tn, group_size=32, codebook=codebook),
            ),
            n,
        )
        for n, rank, tm, tn in shapes
    ]
    stacked = stack_linears([linear.plain for linear in linears])
    assert torch.equal(stacked.packed, torch.cat([pack_codes(linear.codes) for linear in linears]))
    assert (stacked.spec.n, stacked.spec.k, stacked.spec.group_size) == (173, 96, 32)
    sidecar = (stacked.u, stacked.v, stacked.gain)
    weight = dequantize_layer(stacked.spec, stacked.packed, stacked.scale, sidecar)
    expected = torch.cat([dequantize(linear) for linear in linears])
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
def test_kernel_multiplies_by_the_rounded_weight(rank: int) -> None:
    source = random_linear(LinearSpec("m", 40, 64, make_group(rank=rank, tile_m=16, tile_n=24)), 0)
    spec, layer = loaded_layer(source, torch.bfloat16)
    kernel = ReferenceKernel(spec)
    kernel.prepare(layer)
    x, bias = torch.randn(3, 64).bfloat16(), torch.randn(40).bfloat16()
    wanted = torch.nn.functional.linear(x, dequantize(source).bfloat16(), bias)
    torch.testing.assert_close(kernel(layer, x, bias), wanted, rtol=2e-2, atol=2e-2)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_layer_with_row_scales_is_its_linears(dtype: torch.dtype, group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linears = [
        plain_linear(
            TileGrid(n, 192, 16, 24),
            dtype,
            generator,
            codebook="quad8",
            group_size=group_size,
            rank=rank,
            row_scaled=True,
        )
        for n, rank in ((20, 0), (33, 4))
    ]
    stacked = stack_linears(linears)
    assert stacked.spec.dtype == dtype
    layer = stacked.module()
    kernel = ReferenceKernel(dataclasses.replace(stacked.spec, dtype=torch.float32))
    kernel.prepare(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = torch.randn(3, 192)
    wanted = torch.cat([naive_matmul(x, linear) for linear in linears], dim=1)
    torch.testing.assert_close(kernel(layer, x, None).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_bits", "row_scale"), [(8, 2.0**-12), (6, -7 * 2.0**-13)])
def test_no_product_of_two_scales_is_rounded(
    dtype: torch.dtype, num_bits: int, row_scale: float
) -> None:
    codes = torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), dtype=torch.int8)
    scales = expand_scales(codes[None, :], torch.tensor([[row_scale]], dtype=dtype))
    assert scales.dtype == dtype
    assert torch.equal(scales.double(), codes.double()[None, :] * row_scale)
