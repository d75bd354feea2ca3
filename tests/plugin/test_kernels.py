# SPDX-License-Identifier: Apache-2.0
"""Which kernel a layer gets, and the arithmetic of the one that goes through vLLM's kernel."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import vllm.model_executor.parameter as vllm_parameter
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

import svsk_kernels.cpu.cpu_kernel as cpu
import svsk_vllm.plugin.kernel_choice as choice
from svsk_kernels.cpu.cpu_kernel import CpuKernel, cpu_ops_obstacle
from svsk_kernels.cpu.portable_kernel import PortableKernel
from svsk_kernels.cpu.processor import has_avx512
from svsk_kernels.gpu.int8_layer import Int8Kernel
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.layer_kernel import LayerSpec
from svsk_kernels.naive import naive_matmul
from svsk_kernels.reference_kernel import ReferenceKernel
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup
from svsk_vllm.format import (
    Codebook,
    ConfigGroup,
    LinearSpec,
    SvskCheckpointConfig,
    SvskFormatError,
    code_values,
)
from svsk_vllm.plugin import split_kernel
from svsk_vllm.plugin.kernel_choice import choose_kernel
from svsk_vllm.plugin.quantization_config import SvskConfig
from svsk_vllm.plugin.split_kernel import SplitKernel, split_codes
from tests.support.cpu_paths import needs_avx512
from tests.support.format_builders import make_group, random_linear
from tests.support.layers import loaded_layer

CPU = torch.device("cpu")
SPEC = LayerSpec(64, 128, 64, "quad8", torch.bfloat16)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.delenv("SVSK_KERNEL", raising=False)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")  # with AMX it would round activations to 8 bits
    choice._warned.clear()
    with set_current_vllm_config(VllmConfig()):
        yield


def test_quad8_levels_are_two_codes() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)
    high, low = split_codes(codes)
    assert torch.equal((16 * high.double() + low) / 8, code_values(codes, "quad8", torch.float64))
    for part in (high, low):
        assert part.min() >= -8
        assert part.max() <= 7


@needs_avx512
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize(
    "size", [1.0, 2.0**-12], ids=["ordinary scales", "scales of which an eighth is subnormal"]
)
def test_separate_kernel_equals_reference(
    codebook: Codebook, dtype: torch.dtype, bound: float, size: float
) -> None:
    group = make_group(rank=5, tile_m=40, tile_n=72, codebook=codebook)
    source = random_linear(LinearSpec("m", 96, 128, group, dtype), 0)
    source = type(source)(
        source.spec, source.codes, (source.scale * size), source.u, source.v, source.gain * size
    )
    spec, layer = loaded_layer(source, dtype)
    as_loaded(layer)
    kernel = SplitKernel("m", spec, (96, 128), CPU)
    kernel.prepare(layer)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(96, generator=torch.Generator().manual_seed(1)).to(dtype) * size
    expected = naive_matmul(x, source.plain, bias)
    assert float((kernel(layer, x, bias).double() - expected).norm() / expected.norm()) < bound


@needs_avx512
def test_scale_that_cannot_be_doubled_is_refused() -> None:
    source = random_linear(
        LinearSpec("m", 32, 64, make_group(rank=0, codebook="quad8"), torch.float16), 0
    )
    spec, layer = loaded_layer(source, torch.float16)
    as_loaded(layer)
    layer.weight_scale.data[3, 0] = 40000.0
    with pytest.raises(
        SvskFormatError, match=r"m.weight_scale: twice the largest .*--dtype bfloat16"
    ):
        SplitKernel("m", spec, (32, 64), CPU).prepare(layer)


def as_loaded(layer: Any) -> None:
    """The classes of parameters the linear method registers, which vLLM's kernels ask for."""
    layout: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "weight_loader": print}
    packed = PackedvLLMParameter(
        data=layer.weight_packed.data, packed_dim=1, packed_factor=8, **layout
    )
    scale = GroupQuantScaleParameter(data=layer.weight_scale.data, **layout)
    del layer.weight_packed, layer.weight_scale
    layer.bias = None
    layer.register_parameter("weight_packed", packed)
    layer.register_parameter("weight_scale", scale)


@pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
def test_cpu_layers_get_the_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), CpuKernel)
    if has_avx512():  # vLLM's kernel for CPUs needs it
        monkeypatch.setenv("SVSK_KERNEL", "split")
        assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), SplitKernel)
    monkeypatch.setenv("SVSK_KERNEL", "reference")
    assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), ReferenceKernel)


def test_batch_invariance_takes_a_fused_kernel_or_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, key = torch.device("cuda"), "svsk_version"
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    for kernel, spec in (
        (TritonKernel, SPEC),
        (Int8Kernel, dataclasses.replace(SPEC, codebook="int8")),
    ):
        monkeypatch.setattr(kernel, "obstacle", staticmethod(lambda *_: None))
        found: Any = choose_kernel("m", spec, (64, 128), gpu)
        assert isinstance(found, kernel)
        assert getattr(found, "matmul", found).spec.batch_invariant
        assert str(get_current_vllm_config().additional_config[key]).endswith(" batch invariant")
    for name in ("split", "portable", "reference"):
        monkeypatch.setenv("SVSK_KERNEL", name)
        for device in (gpu, CPU):
            with pytest.raises(
                SvskFormatError,
                match=f"m: VLLM_BATCH_INVARIANT=1, .*but SVSK_KERNEL={name}. Unset one of the two",
            ):
                choose_kernel("m", SPEC, (64, 128), device)
    monkeypatch.delenv("SVSK_KERNEL")
    monkeypatch.setattr(TritonKernel, "obstacle", staticmethod(lambda *_: "groups of 128"))
    monkeypatch.setattr(CpuKernel, "obstacle", staticmethod(lambda *_: "there is no compiler"))
    for device, obstacle in ((gpu, "groups of 128"), (CPU, "there is no compiler")):
        with pytest.raises(
            SvskFormatError,
            match=f"m: .* can do, but {obstacle}. Unset VLLM_BATCH_INVARIANT, or serve the dense",
        ):
            choose_kernel("m", SPEC, (64, 128), device)
    plan = SidecarPlan(64, (Bundle((0, 128), (SlotGroup(1, 64, 4, 0),)),))
    table = dataclasses.replace(SPEC, plan=plan, lookup=True)
    with pytest.raises(SvskFormatError, match=r"m: .*rows of this table .*--head int8"):
        choose_kernel("m", table, (64, 128), gpu)


@pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
def test_a_layer_on_a_cpu_is_batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    source = random_linear(LinearSpec("m", 64, 256, make_group(rank=8), torch.float32))
    spec, layer = loaded_layer(source, torch.float32)
    kernel = choose_kernel("m", spec, (64, 256), CPU)
    kernel.prepare(layer)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0))
    whole = kernel(layer, x, None)
    assert all(torch.equal(kernel(layer, x[:m], None), whole[:m]) for m in range(1, 9))


def test_other_devices_get_the_triton_kernels_or_hear_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(TritonKernel, "obstacle", staticmethod(lambda *_: None))
    assert isinstance(choose_kernel("m", SPEC, (64, 128), gpu), TritonKernel)
    monkeypatch.setattr(
        TritonKernel,
        "obstacle",
        staticmethod(lambda *_: "the GPU is older than compute capability 8.0"),
    )
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernel("m", SPEC, (64, 128), gpu), SplitKernel)
    assert (
        "slower: the GPU is older than compute capability 8.0. SVSK_KERNEL chooses another."
        in caplog.text
    )


@pytest.mark.parametrize("changes", [{"codebook": "int8"}, {"lookup": True}])
def test_tables_are_served_where_no_kernel_of_ours_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    """They are quantised by default; vLLM's own 4-bit kernels take the blocks there."""
    for kernel in (TritonKernel, Int8Kernel):
        monkeypatch.setattr(kernel, "obstacle", staticmethod(lambda *_: "the GPU is too old"))
    spec, gpu = dataclasses.replace(SPEC, **changes), torch.device("cuda")
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernel("m", spec, (64, 128), gpu), PortableKernel)
    assert "float32 products with int8 levels, which is slower: the GPU is too old." in caplog.text
    monkeypatch.setenv("SVSK_KERNEL", "split")
    with pytest.raises(SvskFormatError, match="vLLM's 4-bit kernels do not take"):
        choose_kernel("m", spec, (64, 128), gpu)


def test_compiled_graphs_are_kept_apart_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for wanted in ("portable", "reference"):
        monkeypatch.setenv("SVSK_KERNEL", wanted)
        with set_current_vllm_config(VllmConfig(additional_config={"mine": 1})):
            choose_kernel("m", SPEC, (64, 128), CPU)
            hashes.add(get_current_vllm_config().compute_hash())
            assert get_current_vllm_config().additional_config["mine"] == 1
    assert len(hashes) == 2


@needs_avx512
def test_an_obstacle_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "cpu_ops_obstacle", lambda: "there is no compiler")
    with caplog.at_level(logging.WARNING):
        for rows in (64, 96):
            kernel = choose_kernel("m", dataclasses.replace(SPEC, n=rows), (rows, 128), CPU)
            assert isinstance(kernel, SplitKernel)
    assert [record.getMessage() for record in caplog.records] == [
        "SVSK layers run on CPUWNA16LinearKernel and a sidecar apart, which is slower: there is no"
        " compiler. SVSK_KERNEL chooses another."
    ]
    monkeypatch.setenv("SVSK_KERNEL", "fused")
    with pytest.raises(
        SvskFormatError,
        match=r"m: SVSK_KERNEL=fused, but there is no compiler\. Unset it, or set it to portable",
    ):
        choose_kernel("m", SPEC, (64, 128), CPU)
    monkeypatch.setenv("SVSK_KERNEL", "fast")
    expected = "SVSK_KERNEL=fast: no such kernel, expected one of auto, fused, split, portable"
    with pytest.raises(SvskFormatError, match=expected):
        choose_kernel("m", SPEC, (64, 128), CPU)


@pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
@pytest.mark.parametrize("features", ["avx2", "avx512"])
def test_a_lesser_processor_gets_the_cpu_kernel_with_its_instructions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, features: str
) -> None:
    if features == "avx512" and not torch.cpu._is_avx512_supported():
        pytest.skip("the processor has no AVX-512")
    monkeypatch.setenv("SVSK_CPU_FEATURES", features)
    spec = dataclasses.replace(SPEC, n=80)
    config = VllmConfig(additional_config={})
    with caplog.at_level(logging.INFO), set_current_vllm_config(config):
        kernel = choose_kernel("m", spec, (80, 128), CPU)
    assert isinstance(kernel, CpuKernel)
    assert kernel.instructions == features
    assert config.additional_config["svsk_kernels"] == [f"CpuKernel {features}"]
    assert [record.levelname for record in caplog.records if "SVSK" in record.msg] == ["INFO"]
    assert f"80 x 128 run on the CPU kernel ({features})" in caplog.text


@pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
def test_activations_of_eight_bits_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the environment, or by vLLM's config, which the environment overrules."""
    spec = dataclasses.replace(SPEC, n=112)
    config = VllmConfig(additional_config={"svsk": {"activations": "int8"}})
    with caplog.at_level(logging.INFO), set_current_vllm_config(config):
        kernel = choose_kernel("m", spec, (112, 128), CPU)
        assert isinstance(kernel, CpuKernel)
        assert kernel.int8
        assert "int8 activations" in config.additional_config["svsk_kernels"][0]
        assert "int8 activations)" in caplog.text
        monkeypatch.setenv("SVSK_ACTIVATIONS", "exact")
        kernel = choose_kernel("m", spec, (112, 128), CPU)
        assert isinstance(kernel, CpuKernel)
        assert not kernel.int8
    monkeypatch.setenv("SVSK_ACTIVATIONS", "int8")
    monkeypatch.setenv("SVSK_KERNEL", "portable")
    with pytest.raises(
        SvskFormatError, match=r"m: activations int8, .*, but the layer runs on PortableKernel"
    ):
        choose_kernel("m", spec, (112, 128), CPU)
    table = dataclasses.replace(spec, lookup=True)
    assert isinstance(choose_kernel("m", table, (112, 128), CPU), PortableKernel)
    monkeypatch.setenv("SVSK_ACTIVATIONS", "fp8")
    with pytest.raises(SvskFormatError, match="SVSK_ACTIVATIONS=fp8: expected exact or int8"):
        choose_kernel("m", spec, (112, 128), CPU)


@pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
def test_activations_that_the_checkpoint_recommends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The user's word overrules them; where no kernel takes them, a line says so."""
    spec = dataclasses.replace(SPEC, n=144)
    config = VllmConfig(additional_config={})
    groups = {"g": ConfigGroup(targets=("Linear",))}
    stored = SvskCheckpointConfig(config_groups=groups, activations="int8")
    config.quant_config = SvskConfig(stored)

    def chosen() -> Any:
        return choose_kernel("m", spec, (144, 128), CPU)

    choice._tell_exact.cache_clear()
    with caplog.at_level(logging.WARNING), set_current_vllm_config(config):
        assert chosen().int8
        config.additional_config["svsk"] = {"activations": "exact"}
        assert not chosen().int8
        del config.additional_config["svsk"]
        monkeypatch.setenv("SVSK_ACTIVATIONS", "exact")
        assert not chosen().int8
        monkeypatch.delenv("SVSK_ACTIVATIONS")
        assert "recommends" not in caplog.text
        monkeypatch.setenv("SVSK_KERNEL", "portable")
        for _ in range(2):
            assert isinstance(chosen(), PortableKernel)
    assert caplog.text.count("PortableKernel multiplies them as they are") == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"activation": "int8"}, "holds something else than activations"),
        ("int8", "holds something else than activations"),
        ({"activations": 8}, r"svsk\.activations=8: expected exact or int8"),
    ],
)
def test_what_the_config_says_wrongly_is_refused(section: Any, message: str) -> None:
    with (
        set_current_vllm_config(VllmConfig(additional_config={"svsk": section})),
        pytest.raises(SvskFormatError, match=message),
    ):
        choose_kernel("m", SPEC, (64, 128), CPU)


def test_a_processor_without_compiler_and_avx512_is_served_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SVSK_CPU_FEATURES", "avx2")
    monkeypatch.setattr(cpu, "cpu_ops_obstacle", lambda: "there is no compiler")
    with caplog.at_level(logging.WARNING):
        for rows in (64, 96):
            kernel = choose_kernel("m", dataclasses.replace(SPEC, n=rows), (rows, 128), CPU)
            assert isinstance(kernel, PortableKernel)
    assert [record.getMessage() for record in caplog.records] == [
        "SVSK layers run on float32 products with int8 levels, which is slower: there is no"
        " compiler. vLLM's CPUWNA16LinearKernel cannot run: the processor has no AVX-512."
        " Serve with --dtype float32: this processor multiplies in no other. SVSK_KERNEL chooses"
        " another."
    ]
    monkeypatch.setenv("SVSK_KERNEL", "split")
    with pytest.raises(
        SvskFormatError, match=r"m: vLLM's CPUWNA16LinearKernel cannot run: .*no AVX-512\. Unset"
    ):
        choose_kernel("m", SPEC, (64, 128), CPU)


class Kernel:
    """A kernel of vLLM whose product is what a test says."""

    product: Callable[..., torch.Tensor]

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def process_weights_after_loading(self, layer: object) -> None:
        pass

    def apply_weights(self, layer: object, x: torch.Tensor, bias: None) -> torch.Tensor:
        return type(self).product(x)


def test_an_operator_that_is_missing_or_wrong_is_found_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As vLLM's own kernel is on processors for which its operator was not compiled."""
    monkeypatch.delenv("SVSK_CPU_FEATURES", raising=False)
    monkeypatch.setattr(cpu, "cpu_ops_obstacle", lambda: "there is no compiler")

    def missing(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops._C.gemm_that_nobody_compiled(x)
        return result

    for product, reason in (
        (missing, "no attribute 'gemm_that_nobody_compiled'"),
        (lambda x: x.new_zeros(x.shape[0], 64), "a product in torch.bfloat16 is off by 100%"),
    ):
        named = type("OtherKernel", (Kernel,), {"product": staticmethod(product)})
        monkeypatch.setattr(
            split_kernel, "choose_mp_linear_kernel", lambda config, named=named: named
        )
        caplog.clear()
        choice._warned.clear()
        with caplog.at_level(logging.WARNING):
            assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), PortableKernel)
        assert "vLLM's OtherKernel cannot run: " in caplog.text
        assert reason in caplog.text


def test_float32_is_served_everywhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = dataclasses.replace(SPEC, dtype=torch.float32)
    if cpu_ops_obstacle() is None:
        assert isinstance(choose_kernel("m", exact, (64, 128), CPU), CpuKernel)
    monkeypatch.setattr(cpu, "cpu_ops_obstacle", lambda: "there is no compiler")
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernel("m", exact, (64, 128), CPU), PortableKernel)
    assert "which is slower: there is no compiler. " in caplog.text
    assert "--dtype" not in caplog.text

    def none(config: object) -> None:
        raise ValueError("no kernel\n takes it")

    monkeypatch.setattr(split_kernel, "choose_mp_linear_kernel", none)
    gpu = torch.device("cuda")
    assert isinstance(choose_kernel("m", exact, (64, 128), gpu), PortableKernel)
    monkeypatch.setattr(TritonKernel, "obstacle", staticmethod(lambda *_: "the GPU is too old"))
    with pytest.raises(
        SvskFormatError, match=r"no 4-bit kernel of vLLM takes .*\(no kernel takes it\)\. Change"
    ):
        choose_kernel(
            "m", SPEC, (64, 128), gpu
        )  # there an error is worth more than a model at a tenth of its speed


def test_portable_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", "portable")
    monkeypatch.setattr(choice, "has_bf16_products", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernel("m", SPEC, (64, 128), CPU), PortableKernel)
    assert not caplog.records
