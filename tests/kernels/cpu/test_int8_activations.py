# SPDX-License-Identifier: Apache-2.0
"""Activations of 8 bits: integers bit for bit, whole layers against the reference, extremes."""

import dataclasses
from typing import Any

import pytest
import torch

from svsk_kernels.cpu.cpu_kernel import CpuKernel, cpu_ops_obstacle
from svsk_kernels.naive import naive_matmul, round_activations
from svsk_vllm.format import Codebook, LinearSpec, code_values, pack_codes
from svsk_vllm.format.group_scales import ScaleBits
from tests.support.cpu_paths import PATHS
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer

if obstacle := cpu_ops_obstacle():
    pytest.skip(obstacle, allow_module_level=True)

BOUND = {torch.bfloat16: 3.5e-3, torch.float16: 4e-4, torch.float32: 2e-6}
every_path = pytest.mark.parametrize("path", PATHS)


def kernel_of(spec: Any, layer: torch.nn.Module, path: str) -> CpuKernel:
    kernel = CpuKernel(spec, "int8")
    if path == "avx512_bf16" and spec.dtype == torch.float32:
        pytest.skip("that path takes no float32")
    kernel.instructions = path
    kernel.prepare(layer)
    return kernel


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize(
    ("group_size", "bits", "n", "k", "rank"),
    [(16, 6, 75, 208, 5), (32, 8, 33, 96, 0), (64, 16, 48, 192, 20), (32, 16, 20, 32, 3)],
)
def test_layer_equals_reference(
    path: str,
    dtype: torch.dtype,
    codebook: Codebook,
    group_size: int,
    bits: ScaleBits,
    n: int,
    k: int,
    rank: int,
) -> None:
    """Also where the last 64 columns are fewer, and with every count of rows up to 13."""
    group = make_group(
        group_size=group_size, scale_bits=bits, codebook=codebook, rank=rank, tile_m=40, tile_n=100
    )
    source = random_linear(LinearSpec("m", n, k, group, dtype))
    spec, layer = loaded_layer(source, dtype)
    kernel = kernel_of(spec, layer, path)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(n, generator=generator).to(dtype)
    for rows in (*range(14), 29):
        x = torch.randn(rows, k, generator=generator).to(dtype)
        found = kernel(layer, x, bias)
        assert found.shape == (rows, n)
        expected = naive_matmul(x, source.plain, bias, int8=True)
        error = float((found.double() - expected).norm() / expected.norm()) if rows else 0.0
        assert error < BOUND[dtype], (rows, error)
    exact = naive_matmul(x, source.plain, bias)
    assert float((exact - expected).norm() / exact.norm()) > 2e-3  # the test can tell the two


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("codes", ["lowest", "highest", "random"])
def test_integers_are_exact(
    path: str, dtype: torch.dtype, codebook: Codebook, group_size: int, codes: str
) -> None:
    """Scales of 1: sums are whole multiples of 1/8, below 2^24 of them, and rounded once."""
    n, k = 37, 64
    source = random_linear(
        LinearSpec("m", n, k, make_group(group_size=group_size, codebook=codebook), dtype)
    )
    generator = torch.Generator().manual_seed(3)
    chosen = {
        "lowest": torch.full((n, k), -8),
        "highest": torch.full((n, k), 7),
        "random": torch.randint(-8, 8, (n, k), generator=generator),
    }[codes].to(torch.int8)
    spec, layer = loaded_layer(dataclasses.replace(source, codes=chosen), dtype)
    layer.weight_packed.data = pack_codes(chosen)
    layer.weight_scale.data.fill_(1)
    kernel = kernel_of(spec, layer, path)
    signs = torch.randint(0, 2, (9, k), generator=generator) * 2 - 1
    x = torch.randint(-127, 128, (9, k), generator=generator)
    x[:4] = torch.stack((signs[0] * 0 + 127, signs[0] * 0 - 127, 127 * signs[0], 0 * signs[0]))
    x[4:, 5] = 127  # so every scale is 1
    x = x.to(dtype)
    assert torch.equal(round_activations(x), x.double())
    expected = x.double() @ code_values(chosen, codebook, torch.float64).T
    for rows in (9, 1, 4):  # in tiles of many rows, and of few
        found = kernel(layer, x[:rows], None)
        assert torch.equal(found, expected[:rows].float().to(dtype))


@every_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(path: str, bad: float) -> None:
    """Of the row that has it, and of no other."""
    source = random_linear(LinearSpec("m", 32, 128, make_group(), torch.bfloat16))
    spec, layer = loaded_layer(source, torch.bfloat16)
    kernel = kernel_of(spec, layer, path)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[2, 70] = bad
    found = kernel(layer, x, None)
    assert not found[2].isfinite().any()
    assert found[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_tables_and_codes_of_eight_bits_stay_exact() -> None:
    source = random_linear(LinearSpec("m", 32, 128, make_group(), torch.bfloat16))
    spec, _ = loaded_layer(source, torch.bfloat16)
    assert CpuKernel(spec, "int8").int8
    assert not CpuKernel(dataclasses.replace(spec, lookup=True), "int8").int8
    assert not CpuKernel(dataclasses.replace(spec, codebook="int8"), "int8").int8
    assert not CpuKernel(spec).int8


def test_memory_is_that_of_exact_activations() -> None:
    source = random_linear(LinearSpec("m", 250, 512, make_group(), torch.bfloat16))
    sizes = set()
    for activations in ("exact", "int8"):
        spec, layer = loaded_layer(source, torch.bfloat16)
        kernel: Any = CpuKernel(spec, activations)  # type: ignore[arg-type]
        kernel.prepare(layer)
        sizes.add(sum(tensor.nbytes for tensor in layer.parameters()))
    assert len(sizes) == 1
