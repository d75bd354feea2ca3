# SPDX-License-Identifier: Apache-2.0
"""The layer on any processor.

Exact in float32, in every layout, and what processors are told apart by.
"""

import pytest
import torch

from svsk_kernels.cpu.portable_kernel import PortableKernel
from svsk_kernels.cpu.processor import (
    has_avx512,
    has_bf16_products,
    instructions_for,
    product_dtype,
)
from svsk_kernels.cpu.widened_op import widened_linear
from svsk_kernels.errors import KernelError
from svsk_kernels.naive import naive_matmul
from svsk_kernels.reference_kernel import ReferenceKernel
from svsk_offline.precision import block_dtype
from svsk_vllm.format import Codebook, LinearSpec
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer

CPU = torch.device("cpu")


@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize(
    ("stored", "dtype", "bound"),
    [
        (torch.bfloat16, torch.float32, 2e-6),
        (torch.bfloat16, torch.bfloat16, 3e-3),
        (torch.float16, torch.float16, 4e-4),
        (torch.float32, torch.float32, 2e-6),
    ],
)
@pytest.mark.parametrize("m", [0, 1, 9])
def test_layer_is_exact_but_for_the_rounding_of_its_result(
    codebook: Codebook, stored: torch.dtype, dtype: torch.dtype, bound: float, m: int
) -> None:
    group = make_group(rank=5, tile_m=40, tile_n=72, group_size=32, codebook=codebook)
    source = random_linear(LinearSpec("m", 100, 96, group, stored), 0)
    spec, layer = loaded_layer(source, dtype)
    kernel = PortableKernel(spec)
    kernel.prepare(layer)
    x = torch.randn(m, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(100, generator=torch.Generator().manual_seed(2)).to(dtype)
    for term in (None, bias):
        y, expected = kernel(layer, x, term), naive_matmul(x, source.plain, term)
        assert (y.dtype, y.shape) == (dtype, (m, 100))
        assert float((y.double() - expected).norm()) <= bound * float(expected.norm())


def test_memory_of_a_base_is_a_byte_per_weight_and_its_scales() -> None:
    spec, layer = loaded_layer(
        random_linear(LinearSpec("m", 256, 512, make_group(rank=0)), 0), torch.bfloat16
    )
    PortableKernel(spec).prepare(layer)
    assert sum(tensor.nbytes for tensor in layer.parameters()) == 256 * 512 + 256 * (512 // 64) * 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_rows_are_widened_in_blocks(dtype: torch.dtype) -> None:
    """More rows than a block holds, and no whole number of blocks."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (1000, 512), generator=generator).to(dtype)
    scale = torch.rand(1000, 8, generator=generator)
    x = torch.randn(3, 512, generator=generator)
    whole = weight.double() * scale.double().repeat_interleave(64, dim=1)
    torch.testing.assert_close(
        widened_linear(x, weight, scale).double(), x.double() @ whole.T, rtol=1e-4, atol=1e-2
    )
    torch.testing.assert_close(
        widened_linear(x, weight).double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-2
    )


def test_op_is_described_and_compiles() -> None:
    x, weight, scale = (
        torch.randn(4, 64),
        torch.randint(-8, 8, (48, 64), dtype=torch.int8),
        torch.rand(48, 2),
    )
    torch.library.opcheck(torch.ops.svsk.widened_linear.default, (x, weight, scale))
    torch.library.opcheck(torch.ops.svsk.widened_linear.default, (x.bfloat16(), weight.bfloat16()))


@pytest.mark.parametrize("features", ["avx2", "avx512"])
def test_a_simulated_processor_has_no_bfloat16_products(
    monkeypatch: pytest.MonkeyPatch, features: str
) -> None:
    monkeypatch.setenv("SVSK_CPU_FEATURES", features)
    assert not has_bf16_products()
    assert has_avx512() == (features == "avx512" and torch.cpu._is_avx512_supported())
    wanted = "avx512" if has_avx512() else "avx2"
    assert {instructions_for(dtype) for dtype in (torch.bfloat16, torch.float32)} == {wanted}
    assert (
        block_dtype(CPU)
        == product_dtype(torch.bfloat16, CPU)
        == product_dtype(torch.float16, CPU)
        == torch.float32
    )
    gpu = torch.device("cuda")
    assert block_dtype(gpu) == product_dtype(torch.bfloat16, gpu) == torch.bfloat16


def test_no_simulation_is_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVSK_CPU_FEATURES", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_avx512_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    assert instructions_for(torch.float16) == "avx512_bf16"
    assert instructions_for(torch.float32) == "avx512"
    with monkeypatch.context() as hidden:
        hidden.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert instructions_for(torch.float16) == "avx512"
    assert block_dtype(CPU) == product_dtype(torch.bfloat16, CPU) == torch.bfloat16
    monkeypatch.setenv("SVSK_CPU_FEATURES", "avx1024")
    with pytest.raises(
        KernelError, match="SVSK_CPU_FEATURES=avx1024: expected avx2 or avx512, or unset it"
    ):
        has_avx512()


def test_reference_multiplies_in_float32_where_the_processor_has_nothing_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = random_linear(LinearSpec("m", 96, 128, make_group(rank=4, tile_m=40, tile_n=72)), 0)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(96, generator=torch.Generator().manual_seed(2)).bfloat16()
    monkeypatch.setenv("SVSK_CPU_FEATURES", "avx2")
    spec, layer = loaded_layer(source, torch.bfloat16)
    kernel = ReferenceKernel(spec)
    kernel.prepare(layer)
    assert layer.weight.dtype == torch.bfloat16  # it is what the dense model takes, not twice
    with monkeypatch.context() as patch:  # no product in bfloat16, by whatever way
        patch.setattr(torch.nn.functional, "linear", None)
        y = kernel(layer, x, bias)
    expected = x.double() @ layer.weight.double().T + bias.double()
    assert y.dtype == torch.bfloat16
    assert float((y.double() - expected).norm() / expected.norm()) < 3e-3
