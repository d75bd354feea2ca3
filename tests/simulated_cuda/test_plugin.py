# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers with the plugin's method, built and run as by the engine, on a simulated GPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make setup` installs it")

import svsk_kernels.gpu.folded_product as folded_product
import svsk_kernels.gpu.launch as launch
import svsk_vllm.plugin.kernel_choice as choice
from svsk_kernels.gpu import matmul_op as dispatch
from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.repack_base import Base
from svsk_kernels.gpu.repack_sidecar import PlanarSidecar
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.group_scales import expand_scales
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.reference_kernel import ReferenceKernel, dequantize_layer
from svsk_kernels.sidecar_op import sidecar_matmul
from svsk_vllm.format import Codebook, LinearSpec, pack_codes, unpack_codes
from svsk_vllm.format.group_scales import ScaleBits
from svsk_vllm.plugin import split_kernel
from svsk_vllm.plugin.hot_rows import HotRows
from svsk_vllm.plugin.sidecar_loader import Arrived
from svsk_vllm.plugin.split_kernel import SplitKernel
from tests.support.format_builders import make_group, random_linear
from tests.support.simulated_cuda import on_gpu, simulated_cuda
from tests.support.unpack_gpu import (
    unpack_base,
    unpack_scale,
    unpack_scale_codes,
    unpack_sidecar,
)
from tests.support.vllm_layers import (
    LAYERS,
    as_rank,
    build,
    expected_output,
    output,
    parameters,
    parts_of,
)

GPU = torch.device("cuda", 0)
KERNELS = {
    torch.ops.svsk.matmul.default: dispatch._matmul,
    torch.ops.svsk.sidecar.default: sidecar_matmul,
}


@pytest.fixture(params=[(0, 1), (1, 2)], ids=["whole", "second of two ranks"])
def rank(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, int]]:
    monkeypatch.setattr(dispatch, "_warmed", set())
    monkeypatch.setattr(dispatch, "_prepared", {})
    with as_rank(monkeypatch, *request.param):
        yield request.param


class Products:
    """Stands for the launchers.

    Multiplies by the weight that the tensors on their device stand for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spec: LayerSpec | None = None
        self.kernels: list[str] = []
        monkeypatch.setattr(
            launch,
            "PackedProduct",
            lambda base, side, bits, chosen, tiles, **_: partial(self, chosen.kernel, bits),
        )
        monkeypatch.setattr(
            folded_product,
            "FoldedProduct",
            lambda base, side, bits, dtype: partial(self, "fold", bits),
        )

    def __call__(
        self,
        kernel: str,
        bits: int,
        x: torch.Tensor,
        base: Base,
        side: PlanarSidecar | None,
        bias: Any,
    ) -> torch.Tensor:
        assert self.spec is not None
        self.kernels.append(kernel)
        stored = [] if side is None else [getattr(side, name) for name in side.names()]
        devices = {
            x.device,
            base.words.device,
            base.scale.device,
            *(tensor.device for tensor in stored),
        }
        assert devices == {x.device}
        counters = launch.counters.get(x.device)
        assert counters.shrink.device == counters.decode.device == x.device
        assert not counters.shrink.any()
        assert not counters.decode.any()
        spec = self.spec
        packed = unpack_base(base.words, base.n, base.k, base.plane)
        if base.row_scale is None:
            scale = unpack_scale(base.scale, base.n, base.k // base.group_size)
        else:
            assert base.row_scale.device == x.device
            size = (base.n, base.k, base.plane, base.group_size)
            codes = unpack_scale_codes(base.scale, *size)
            scale = expand_scales(codes, base.row_scale[: base.n, None])
        factors = (
            None
            if side is None or spec.plan is None
            else unpack_sidecar(side, spec.plan, base.k, bits)
        )
        return torch.nn.functional.linear(
            x, dequantize_layer(spec, packed, scale, factors).to(x.dtype), bias
        )


class BaseProduct:
    """Stands for vLLM's own kernel of evenly spaced levels, which differs between devices."""

    def process_weights_after_loading(self, layer: Any) -> None:
        codes = unpack_codes(layer.weight_packed.data, layer.weight_packed.shape[1] * 8)
        groups = codes.unflatten(
            1, (layer.weight_scale.shape[1], -1)
        ) * layer.weight_scale.data.float().unsqueeze(-1)
        replace_parameters(layer, {"weight_packed": groups.flatten(1)})

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = x.float() @ layer.weight_packed.T
        return (y if bias is None else y + bias).to(x.dtype)


@pytest.mark.parametrize(
    ("codebook", "group_size", "bits"),
    [("int4", 64, 16), ("quad8", 64, 16), ("quad8", 16, 6), ("int4", 32, 8)],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_fused_layers(
    monkeypatch: pytest.MonkeyPatch,
    rank: tuple[int, int],
    kind: str,
    codebook: Codebook,
    group_size: int,
    bits: ScaleBits,
) -> None:
    products = Products(monkeypatch)
    monkeypatch.setenv("SVSK_KERNEL", "fused")
    # The rule gives layers as small as these one kernel.
    all_kernels = Choice("decode", max_m=16), Choice("gemm", max_m=64), Choice("fold")
    monkeypatch.setattr(dispatch, "choices_for", lambda *_: all_kernels)
    linears = parts_of(kind, codebook, group_size, bits)

    def run(
        device: torch.device,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        layer = build(kind, linears, device)
        assert isinstance(layer.quant_method.kernel, TritonKernel)
        products.spec = layer.quant_method.kernel.matmul.spec
        loaded = parameters(layer)
        layer.quant_method.process_weights_after_loading(layer)
        assert {tensor.device for tensor in layer.parameters()} == {device}
        return loaded, parameters(layer), output(layer, device)

    with simulated_cuda(KERNELS):
        found = run(GPU)
        assert set(products.kernels) == {"decode", "gemm", "fold"}  # the warm-up runs all of them
        launch.counters.forget(GPU)
    monkeypatch.setattr(TritonKernel, "obstacle", staticmethod(lambda *_: None))
    monkeypatch.setattr(choice, "CpuKernel", OnCpu)
    expected = run(torch.device("cpu"))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(found[2], expected[2])
    reference = expected_output(kind, linears, build(kind, linears, torch.device("cpu")), rank)
    assert float((found[2].double() - reference).norm() / reference.norm()) < 5e-3


def test_hot_rows_are_put_together_where_they_are(rank: tuple[int, int]) -> None:
    scheme = make_group(targets=["embed"], hot_rows=9)
    linear = random_linear(LinearSpec("embed", 40, 128, scheme))

    def run(device: torch.device) -> dict[str, torch.Tensor]:
        layer = torch.nn.Module()
        hot = HotRows("embed", linear.spec, 24, 20, 20)
        with torch.device(device):
            hot.register(layer, Arrived({None: "embed"}, [scheme]))
        for name, tensor in linear.to_tensors().items():
            parameter: Any = getattr(layer, name.rpartition(".")[2])
            parameter.weight_loader(parameter, tensor)
        hot.join(layer, counted=True)
        assert {tensor.device for tensor in layer.parameters()} == {device}
        return parameters(layer)

    with simulated_cuda({}):
        found = run(GPU)
    expected = run(torch.device("cpu"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(found["weight_packed"][:20], pack_codes(linear.codes[20:], 8))


class OnCpu(TritonKernel):
    """The Triton kernel in place of the CPU's own."""

    label = "Triton"

    def __init__(self, spec: LayerSpec, activations: str = "exact") -> None:
        assert activations == "exact"
        super().__init__(spec, torch.device("cpu"))


@pytest.mark.parametrize(("codebook", "bits"), [("int4", 16), ("quad8", 16), ("int4", 6)])
@pytest.mark.parametrize("kernel", ["split", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
    rank: tuple[int, int],
    kind: str,
    kernel: str,
    codebook: Codebook,
    bits: ScaleBits,
) -> None:
    """The layer as its dequantised weight, and in two parts; scales of one level and of two."""
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    monkeypatch.setattr(
        split_kernel, "_vllm_kernel", lambda prefix, spec, shape, device: BaseProduct()
    )
    linears = parts_of(kind, codebook, 64, bits)
    with simulated_cuda(KERNELS):
        layer = build(kind, linears, GPU)
        assert isinstance(
            layer.quant_method.kernel, SplitKernel if kernel == "split" else ReferenceKernel
        )
        reference = expected_output(kind, linears, layer, rank)
        layer.quant_method.process_weights_after_loading(layer)
        assert all(map(on_gpu, layer.parameters()))
        found = output(layer, GPU)
    assert float((found.double() - reference).norm() / reference.norm()) < 5e-3


def test_reload_under_the_default_device(
    monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int]
) -> None:
    """vLLM makes, loads and processes a layer anew under the device when weights are reloaded."""
    products = Products(monkeypatch)
    linears = parts_of("qkv", "int4")
    with simulated_cuda(KERNELS):
        layers = [build("qkv", linears, GPU) for _ in range(2)]
        products.spec = layers[0].quant_method.kernel.matmul.spec
        layers[0].quant_method.process_weights_after_loading(layers[0])
        with torch.device("cuda"):
            layers[1].quant_method.process_weights_after_loading(layers[1])
            outputs = [output(layer, GPU) for layer in layers]
        first, second = map(parameters, layers)
        launch.counters.forget(GPU)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(*outputs)
