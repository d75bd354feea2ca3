# SPDX-License-Identifier: Apache-2.0
"""Layers of 8-bit codes, and rows that are looked up, by every kernel that runs on a CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from svsk_kernel_tools.stack_linears import StackedLinear, random_linear, stack_linears
from svsk_kernels.codebook import Codebook, code_values
from svsk_kernels.cpu.cpu_kernel import CpuKernel, cpu_ops_obstacle
from svsk_kernels.cpu.portable_kernel import PortableKernel
from svsk_kernels.errors import KernelError
from svsk_kernels.layer_kernel import LayerSpec, TableKernel
from svsk_kernels.naive import PlainLinear, naive_matmul, naive_sidecar
from svsk_kernels.reference_kernel import ReferenceKernel
from svsk_kernels.tile_grid import TileGrid

BOUND = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
KERNELS = [
    "reference",
    "portable",
    pytest.param(
        "fused",
        marks=pytest.mark.skipif(
            cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
        ),
    ),
]


def kernel_of(name: str, spec: LayerSpec) -> Any:
    return {"reference": ReferenceKernel, "portable": PortableKernel, "fused": CpuKernel}[name](
        spec
    )


def linear_of(
    n: int, k: int, dtype: torch.dtype, codebook: Codebook, group_size: int, rank: int
) -> PlainLinear:
    return random_linear(
        TileGrid(n, k, 0, 96 if rank == 3 else 0),
        dtype,
        torch.Generator().manual_seed(n),
        codebook=codebook,
        group_size=group_size,
        rank=rank,
        row_scaled=rank == 4,
    )


def as_table(linear: PlainLinear, dtype: torch.dtype) -> StackedLinear:
    stacked = stack_linears([linear], dtype)
    return replace(stacked, spec=replace(stacked.spec, lookup=True))


def exact_weight(linear: PlainLinear) -> torch.Tensor:
    n, k = linear.codes.shape
    scale = linear.scale.double()
    if linear.row_scale is not None:
        scale = scale * linear.row_scale.double()
    levels = code_values(linear.codes, linear.codebook, torch.float64).view(n, scale.shape[1], -1)
    base = (levels * scale.unsqueeze(-1)).view(n, k)
    return base + naive_sidecar(torch.eye(k, dtype=torch.float64), linear).T


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k", "group_size"), [(17, 64, 64), (37, 192, 32), (160, 144, 16)])
@pytest.mark.parametrize("m", [1, 2, 5, 13])
def test_products_of_eight_bit_codes(
    name: str, dtype: torch.dtype, n: int, k: int, group_size: int, m: int
) -> None:
    linear = linear_of(n, k, dtype, "int8", group_size, 0)
    stacked = stack_linears([linear], dtype)
    layer = stacked.module()
    kernel = kernel_of(name, stacked.spec)
    kernel.prepare(layer)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    for some in (None, bias):
        found = kernel(layer, x, some)
        expected = naive_matmul(x, linear, some)
        assert found.dtype == dtype
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < BOUND[dtype], error


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("codebook", "group_size", "rank"),
    [("int8", 64, 0), ("int8", 16, 0), ("int4", 32, 0), ("quad8", 64, 3), ("int4", 64, 4)],
)
def test_rows_are_those_of_the_weight(
    name: str, dtype: torch.dtype, codebook: Codebook, group_size: int, rank: int
) -> None:
    """Rank 3 with narrow column tiles, rank 4 with scales in two levels."""
    linear = linear_of(45, 192, dtype, codebook, group_size, rank)
    stacked = as_table(linear, dtype)
    layer = stacked.module()
    kernel = kernel_of(name, stacked.spec)
    assert isinstance(kernel, TableKernel)
    kernel.prepare(layer)
    ids = torch.tensor([44, 0, 17, 17, 3, 16])
    found = kernel.rows(layer, ids)
    assert (found.dtype, found.shape) == (dtype, (6, 192))
    exact = exact_weight(linear)[ids]
    if rank:
        torch.testing.assert_close(found, exact.to(dtype), rtol=2**-7, atol=1e-5)
    else:  # a code times a scale is rounded once, by all alike
        assert torch.equal(found, exact.to(dtype))
    # The layer multiplies as before.
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = naive_matmul(x, linear)
    error = (kernel(layer, x, None).double() - expected).norm() / expected.norm()
    assert float(error) < BOUND[dtype]


@pytest.mark.parametrize("kernel", [PortableKernel])
def test_tables_with_tiles_of_rows_are_refused(kernel: Any) -> None:
    linear = random_linear(
        TileGrid(40, 64, 16, 0), torch.bfloat16, torch.Generator().manual_seed(0), rank=2
    )
    stacked = as_table(linear, torch.bfloat16)
    with pytest.raises(KernelError, match="tiles of rows"):
        kernel(stacked.spec).prepare(stacked.module())
