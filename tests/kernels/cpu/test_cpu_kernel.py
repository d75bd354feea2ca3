# SPDX-License-Identifier: Apache-2.0
"""The kernel for CPUs against the float64 reference.

Every layout of tiles, both codebooks, all dtypes, and every path that the processor can run.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svsk_kernels.cpu.cpu_kernel import CpuKernel, cpu_ops_obstacle
from svsk_kernels.cpu.processor import instructions_for
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.naive import naive_matmul, naive_sidecar
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup
from svsk_vllm.format import Codebook, LinearSpec, QuantizedLinear, pack_codes
from tests.support.cpu_paths import PATHS, PATHS_HERE
from tests.support.format_builders import make_group, property_test, random_linear
from tests.support.layers import loaded_layer

if obstacle := cpu_ops_obstacle():
    pytest.skip(obstacle, allow_module_level=True)

BOUND = {torch.bfloat16: 3.5e-3, torch.float16: 3e-4, torch.float32: 2e-6}
"""Rounding of the result, and in bfloat16 of z where the sidecar is most of it."""


every_path = pytest.mark.parametrize("path", PATHS, indirect=True)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels take this path."""
    name: str = request.param
    if name == "avx512_bf16":
        monkeypatch.delenv("SVSK_CPU_FEATURES", raising=False)
    else:
        monkeypatch.setenv("SVSK_CPU_FEATURES", name)
    return name


def linear(
    n: int,
    k: int,
    rank: int = 4,
    tiles: tuple[int, int] = (0, 0),
    *,
    codebook: Codebook = "int4",
    group_size: int = 32,
) -> QuantizedLinear:
    group = make_group(
        rank=rank, tile_m=tiles[0], tile_n=tiles[1], group_size=group_size, codebook=codebook
    )
    return random_linear(LinearSpec("m.proj", n, k, group), 0)


def prepared(source: QuantizedLinear, dtype: torch.dtype) -> tuple[CpuKernel, torch.nn.Module]:
    spec, layer = loaded_layer(source, dtype)
    kernel = CpuKernel(spec)
    assert kernel.instructions == instructions_for(dtype)
    kernel.prepare(layer)
    return kernel, layer


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def test_op_builds_here() -> None:
    assert cpu_ops_obstacle() is None


@every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize(
    ("n", "k", "rank", "tiles", "group_size"),
    [
        (64, 64, 16, (0, 0), 64),
        (100, 96, 3, (48, 0), 32),
        (100, 96, 1, (0, 40), 32),
        (33, 160, 8, (16, 48), 32),
        (96, 192, 5, (512, 1024), 64),
        (40, 32, 20, (3, 5), 32),
        (50, 128, 0, (0, 0), 64),
        (33, 160, 131, (0, 0), 32),
        (40, 96, 512, (0, 40), 32),
    ],
)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 17])
@pytest.mark.usefixtures("path")
def test_layer_equals_reference(
    n: int,
    k: int,
    rank: int,
    tiles: tuple[int, int],
    group_size: int,
    m: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> None:
    source = linear(n, k, rank, tiles, codebook=codebook, group_size=group_size)
    kernel, layer = prepared(source, dtype)
    x, bias = activations(m, k, dtype), activations(1, n, dtype).flatten()
    y = kernel(layer, x, bias)
    assert y.dtype == dtype
    assert error(y, naive_matmul(x, source.plain, bias)) < BOUND[dtype]
    assert error(kernel(layer, x, None), naive_matmul(x, source.plain)) < BOUND[dtype]


@every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_sidecar_alone(dtype: torch.dtype) -> None:
    """Against zero scales, where an error of the sidecar cannot hide behind the base."""
    source = linear(75, 96, 5, (40, 36))
    spec, layer = loaded_layer(source, dtype)
    layer.weight_scale.data.zero_()
    kernel = CpuKernel(spec)
    kernel.prepare(layer)
    x = activations(9, 96, dtype)
    assert error(kernel(layer, x, None), naive_sidecar(x, source.plain)) < BOUND[dtype]


def test_bias_of_another_dtype_is_cast() -> None:
    source = linear(32, 64)
    kernel, layer = prepared(source, torch.bfloat16)
    x, bias = activations(2, 64, torch.bfloat16), torch.randn(32)
    assert torch.equal(kernel(layer, x, bias), kernel(layer, x, bias.bfloat16()))


@every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_many_rows_and_threads_change_nothing(dtype: torch.dtype) -> None:
    """Chunks of rows and shares of threads: a row's result must not depend on its neighbours."""
    source = linear(300, 2048, 16, (128, 1000))
    kernel, layer = prepared(source, dtype)
    x = activations(203, 2048, dtype)
    whole = kernel(layer, x, None)
    assert error(whole, naive_matmul(x, source.plain)) < BOUND[dtype]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(kernel(layer, x, None), whole)
    finally:
        torch.set_num_threads(threads)
    start = whole.new_empty(0, 300)
    for first, last in ((0, 1), (1, 9), (9, 104), (104, 203)):
        part = kernel(layer, x[first:last], None)
        torch.testing.assert_close(part, whole[first:last], rtol=1e-2, atol=1e-2)
        start = torch.cat((start, part))
    assert error(start, naive_matmul(x, source.plain)) < BOUND[dtype]


@every_path
@pytest.mark.usefixtures("path")
def test_large_and_tiny_float16_activations() -> None:
    """A float16 activation is two bfloat16 terms.

    Nothing is lost over its whole range, nothing overflows inside.
    """
    source = linear(32, 64, 8)
    kernel, layer = prepared(source, torch.float16)
    for size in (2.0**-10, 1.0, 2.0**6):
        x = activations(3, 64, torch.float16) * size
        assert error(kernel(layer, x, None), naive_matmul(x, source.plain)) < BOUND[torch.float16]


@every_path
@pytest.mark.usefixtures("path")
def test_rows_without_sidecar_and_bundles() -> None:
    """Parts with different column tiles, and rows of neither between, cut a block of outputs."""
    first, second = linear(8, 64, 2, (4, 48)), linear(6, 64, 3, (0, 32))
    spec_1, layer_1 = loaded_layer(first, torch.bfloat16)
    spec_2, layer_2 = loaded_layer(second, torch.bfloat16)
    assert spec_1.plan is not None
    assert spec_2.plan is not None
    moved = Bundle(spec_2.plan.bundles[0].bounds, (SlotGroup(1, 6, 3, 10),))
    names = ("sidecar_u", "sidecar_v", "sidecar_gain")
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(layer, name).data for layer in (layer_1, layer_2)])
        for name in names
    }
    tensors["weight_packed"] = pack_codes(torch.zeros(16, 64, dtype=torch.int8))
    tensors["weight_scale"] = torch.ones(16, 2, dtype=torch.bfloat16)
    layer = torch.nn.Module()
    replace_parameters(layer, tensors)
    kernel = CpuKernel(
        LayerSpec(
            16, 64, 32, "int4", torch.bfloat16, SidecarPlan(16, (spec_1.plan.bundles[0], moved))
        )
    )
    kernel.prepare(layer)
    x = activations(5, 64, torch.bfloat16)
    y = kernel(layer, x, None)
    assert error(y[:, :8], naive_sidecar(x, first.plain)) < BOUND[torch.bfloat16]
    assert not y[:, 8:10].any()
    assert error(y[:, 10:], naive_sidecar(x, second.plain)) < BOUND[torch.bfloat16]


@property_test
@given(
    instructions=st.sampled_from(PATHS_HERE),
    n=st.integers(1, 70),
    k=st.integers(1, 5).map(lambda groups: 32 * groups),
    rank=st.integers(0, 20),
    tiles=st.tuples(st.integers(0, 80), st.integers(0, 170)),
    m=st.integers(0, 20),
)
def test_any_layout(
    instructions: str, n: int, k: int, rank: int, tiles: tuple[int, int], m: int
) -> None:
    """Compared in absolute terms: a few outputs may nearly cancel."""
    source = linear(n, k, rank, tiles)
    kernel, layer = prepared(source, torch.float16)
    kernel.instructions = instructions
    x = activations(m, k, torch.float16)
    expected = naive_matmul(x, source.plain)
    assert kernel(layer, x, None).shape == expected.shape
    size = float(expected.abs().max()) if m else 0.0
    torch.testing.assert_close(
        kernel(layer, x, None).double(), expected, rtol=1e-3, atol=2e-3 * size
    )


@pytest.mark.parametrize("m", [0, 1, 4])
def test_fake_has_the_strides_of_the_real_op(m: int) -> None:
    kernel, layer = prepared(linear(100, 96, 3, (48, 40)), torch.bfloat16)
    x = activations(m, 96, torch.bfloat16)
    real = kernel(layer, x, None)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = kernel(layer, mode.from_tensor(x), None)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_op_passes_torch_checks_and_compiles() -> None:
    kernel, layer = prepared(linear(40, 64, 4, (16, 48)), torch.bfloat16)
    x = activations(6, 64, torch.bfloat16)
    tensors = [getattr(layer, name) for name in kernel.names]
    numbers = (40, 32, 4, False, kernel.instructions, False, False)
    arguments = (x, layer.weight_packed, layer.weight_scale, None, None, *tensors, *numbers)
    torch.library.opcheck(torch.ops.svsk.cpu_linear.default, arguments)
    compiled = torch.compile(lambda a: kernel(layer, a, None) * 2, dynamic=True)
    for rows in (1, 6):
        torch.testing.assert_close(compiled(x[:rows]), kernel(layer, x[:rows], None) * 2)


def test_non_contiguous_activations() -> None:
    kernel, layer = prepared(linear(32, 64), torch.bfloat16)
    x = activations(64, 5, torch.bfloat16).T
    assert torch.equal(kernel(layer, x, None), kernel(layer, x.contiguous(), None))


def test_wrong_activations_are_refused() -> None:
    kernel, layer = prepared(linear(32, 64), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"x is Float, the scales are BFloat16"):
        kernel(layer, activations(2, 64, torch.float32), None)
    with pytest.raises(RuntimeError, match="x has 96 columns"):
        kernel(layer, activations(2, 96, torch.bfloat16), None)
    kernel.instructions = "sse2"
    with pytest.raises(RuntimeError, match=r"lacks sse2, or there is no path of that name"):
        kernel(layer, activations(2, 64, torch.bfloat16), None)


@pytest.mark.skipif("avx512_bf16" not in PATHS_HERE, reason="the processor has no AVX512-BF16")
def test_a_path_refuses_a_dtype_that_it_does_not_take() -> None:
    kernel, layer = prepared(linear(32, 64), torch.float32)
    kernel.instructions = "avx512_bf16"
    with pytest.raises(RuntimeError, match="x is Float, which avx512_bf16 does not take"):
        kernel(layer, activations(2, 64, torch.float32), None)


def test_memory_of_the_base_is_that_of_the_checkpoint() -> None:
    source = linear(256, 512, 0)
    _, layer = prepared(source, torch.bfloat16)
    assert (
        sum(tensor.nbytes for tensor in layer.parameters())
        == 256 * 512 // 2 + 256 * (512 // 32) * 2
    )


def test_obstacle_names_what_is_missing(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "CXX": "no-such-compiler",
    }
    script = "from svsk_kernels.cpu.cpu_kernel import cpu_ops_obstacle; print(cpu_ops_obstacle())"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "there is no C++ compiler 'no-such-compiler'; install g++ or set CXX" in done.stdout
