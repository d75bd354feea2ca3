# SPDX-License-Identifier: Apache-2.0
"""Which kernel a layer gets, and the arithmetic of the one that goes through vLLM's kernel."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm.model_executor.parameter as vllm_parameter
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

import svsk_vllm.plugin.choice as choice
from svsk_kernels import CpuKernel, LayerSpec, ReferenceKernel, TritonKernel, cpu_ops_obstacle, naive_matmul
from svsk_vllm.format import Codebook, LinearSpec, SvskFormatError, code_values
from svsk_vllm.plugin.choice import choose_kernel
from svsk_vllm.plugin.separate import SeparateKernel, split_codes
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer

CPU = torch.device("cpu")
SPEC = LayerSpec(64, 128, 64, "quad8", torch.bfloat16)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.delenv("SVSK_KERNEL", raising=False)
    with set_current_vllm_config(VllmConfig()):
        yield


def test_quad8_levels_are_two_codes() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)
    high, low = split_codes(codes)
    assert torch.equal((16 * high.double() + low) / 8, code_values(codes, "quad8", torch.float64))
    for part in (high, low):
        assert part.min() >= -8
        assert part.max() <= 7


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize("size", [1.0, 2.0**-12], ids=["ordinary scales", "scales of which an eighth is subnormal"])
def test_separate_kernel_equals_reference(codebook: Codebook, dtype: torch.dtype, bound: float, size: float) -> None:
    group = make_group(rank=5, tile_m=40, tile_n=72, codebook=codebook)
    source = random_linear(LinearSpec("m", 96, 128, group, dtype), 0)
    source = type(source)(source.spec, source.codes, (source.scale * size), source.u, source.v, source.gain * size)
    spec, layer = loaded_layer(source, dtype)
    as_loaded(layer)
    kernel = SeparateKernel("m", spec, (96, 128), CPU)
    kernel.prepare(layer)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(96, generator=torch.Generator().manual_seed(1)).to(dtype) * size
    expected = naive_matmul(x, source, bias)
    assert float((kernel(layer, x, bias).double() - expected).norm() / expected.norm()) < bound


def test_scale_that_cannot_be_doubled_is_refused() -> None:
    source = random_linear(LinearSpec("m", 32, 64, make_group(rank=0, codebook="quad8"), torch.float16), 0)
    spec, layer = loaded_layer(source, torch.float16)
    as_loaded(layer)
    layer.weight_scale.data[3, 0] = 40000.0
    with pytest.raises(SvskFormatError, match=r"m.weight_scale: twice the largest .*--dtype bfloat16"):
        SeparateKernel("m", spec, (32, 64), CPU).prepare(layer)


def as_loaded(layer: Any) -> None:
    """The classes of parameters the linear method registers, which vLLM's kernels ask for."""
    layout: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "weight_loader": print}
    packed = PackedvLLMParameter(data=layer.weight_packed.data, packed_dim=1, packed_factor=8, **layout)
    scale = GroupQuantScaleParameter(data=layer.weight_scale.data, **layout)
    del layer.weight_packed, layer.weight_scale
    layer.register_parameter("weight_packed", packed)
    layer.register_parameter("weight_scale", scale)


@pytest.mark.skipif(cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built")
def test_cpu_layers_get_the_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), CpuKernel)
    monkeypatch.setenv("SVSK_KERNEL", "split")
    assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), SeparateKernel)
    monkeypatch.setenv("SVSK_KERNEL", "reference")
    assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), ReferenceKernel)


def test_other_devices_get_the_triton_kernels_or_hear_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(TritonKernel, "obstacle", staticmethod(lambda *_: None))
    assert isinstance(choose_kernel("m", SPEC, (64, 128), gpu), TritonKernel)
    monkeypatch.setattr(
        TritonKernel, "obstacle", staticmethod(lambda *_: "the GPU is older than compute capability 8.0")
    )
    choice._note.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernel("m", SPEC, (64, 128), gpu), SeparateKernel)
    choice._note.cache_clear()
    assert "slower: the GPU is older than compute capability 8.0" in caplog.text


def test_compiled_graphs_are_kept_apart_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for wanted in ("auto", "split", "reference"):
        monkeypatch.setenv("SVSK_KERNEL", wanted)
        with set_current_vllm_config(VllmConfig(additional_config={"mine": 1})):
            choose_kernel("m", SPEC, (64, 128), CPU)
            hashes.add(get_current_vllm_config().compute_hash())
            assert get_current_vllm_config().additional_config["mine"] == 1
    assert len(hashes) == 3


def test_an_obstacle_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice, "cpu_ops_obstacle", lambda: "there is no compiler")
    choice._note.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), SeparateKernel)
    choice._note.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "SVSK layers of 64 x 128 run on CPUWNA16LinearKernel and a sidecar apart, which is slower: there is no compiler"
    ]
    monkeypatch.setenv("SVSK_KERNEL", "fused")
    with pytest.raises(SvskFormatError, match=r"m: SVSK_KERNEL=fused, but there is no compiler\. Unset it"):
        choose_kernel("m", SPEC, (64, 128), CPU)
    monkeypatch.setenv("SVSK_KERNEL", "fast")
    with pytest.raises(SvskFormatError, match="SVSK_KERNEL=fast: expected one of auto, fused, split, reference"):
        choose_kernel("m", SPEC, (64, 128), CPU)
