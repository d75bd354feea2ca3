# SPDX-License-Identifier: Apache-2.0
"""8-bit layers and rows of tables in the GPU kernels' layouts, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernel_tools.stack_linears import random_linear, stack_linears
from svsk_kernels.gpu.int8_layer import Int8Kernel
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.layer_kernel import TableKernel
from svsk_kernels.naive import PlainLinear, naive_matmul
from svsk_kernels.reference_kernel import ReferenceKernel
from svsk_kernels.tile_grid import TileGrid
from tests.interpreter.layers import BOUNDS, activations

CPU = torch.device("cpu")


def eight_bits(n: int, k: int, group_size: int, dtype: torch.dtype) -> PlainLinear:
    return random_linear(
        TileGrid(n, k, 0, 0),
        dtype,
        torch.Generator().manual_seed(n),
        codebook="int8",
        group_size=group_size,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "group_size"), [(70, 128, 64), (7, 96, 32), (64, 48, 16)])
@pytest.mark.parametrize("m", [1, 15, 17, 70])
def test_product(dtype: torch.dtype, n: int, k: int, group_size: int, m: int) -> None:
    linear = eight_bits(n, k, group_size, dtype)
    stacked = stack_linears([linear], dtype)
    layer = stacked.module()
    kernel = Int8Kernel(stacked.spec, CPU)
    kernel.prepare(layer)
    x = activations(m, 2 * k, dtype)[:, ::2] if m == 15 else activations(m, k, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    for some in (None, bias):
        found = kernel(layer, x, some)
        assert relative_error(found, naive_matmul(x, linear, some)) < BOUNDS[dtype]
    assert kernel(layer, x[:0], None).shape == (0, n)


def test_layer_compiles_to_one_op_for_any_number_of_tokens() -> None:
    stacked = stack_linears([eight_bits(40, 64, 64, torch.float16)])
    layer = stacked.module()
    kernel = Int8Kernel(stacked.spec, CPU)
    kernel.prepare(layer)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernel(layer, x, None), backend="eager", fullgraph=True, dynamic=True
    )
    for m in (2, 5):
        x = activations(m, 64, torch.float16)
        assert torch.equal(compiled(x), kernel(layer, x, None))


def test_other_layers_are_not_taken() -> None:
    spec = stack_linears([eight_bits(8, 64, 64, torch.float16)]).spec
    assert "4 bits" in str(Int8Kernel.obstacle(replace(spec, codebook="int4"), CPU))
    assert "float32" in str(Int8Kernel.obstacle(replace(spec, dtype=torch.float32), CPU))
    assert "no whole groups" in str(Int8Kernel.obstacle(replace(spec, k=72), CPU))
    assert "8 bits" in str(TritonKernel.obstacle(spec, CPU))


@pytest.mark.parametrize(
    ("codebook", "k", "group_size", "rank", "row_scaled"),
    [
        ("int8", 128, 32, 0, False),
        ("int4", 192, 64, 0, False),
        ("quad8", 208, 16, 3, True),
        ("int4", 384, 64, 4, True),
        ("quad8", 96, 32, 4, True),
    ],
)
def test_rows_are_those_of_the_reference(
    codebook: str, k: int, group_size: int, rank: int, row_scaled: bool
) -> None:
    """Planes of 16, 32 and 64 columns, groups longer and shorter than they are."""
    linear = random_linear(
        TileGrid(150, k, 0, 0),
        torch.bfloat16,
        torch.Generator().manual_seed(k),
        codebook=codebook,  # type: ignore[arg-type]
        group_size=group_size,
        rank=rank,
        factor_bits=4,
        row_scaled=row_scaled,
    )
    stacked = stack_linears([linear], torch.bfloat16)
    spec = replace(stacked.spec, lookup=True)
    kernel: TableKernel = (Int8Kernel if codebook == "int8" else TritonKernel)(spec, CPU)
    reference = ReferenceKernel(spec)
    layer, expected = stacked.module(), stacked.module()
    kernel.prepare(layer)
    reference.prepare(expected)
    ids = torch.tensor([149, 0, 64, 64, 5])
    found = kernel.rows(layer, ids)
    torch.testing.assert_close(found, reference.rows(expected, ids), rtol=2**-8, atol=1e-6)
    assert found.float().std() > 0.01
