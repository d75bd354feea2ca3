# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers with the plugin's method, built and run as by the engine, on a simulated GPU."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make setup` installs it")

import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.parameter as vllm_parameter
from vllm.config import VllmConfig, set_current_vllm_config

import svsk_kernels.gpu.launch as launch
import svsk_vllm.plugin.kernel_choice as choice
from svsk_kernels.gpu import matmul_op as dispatch
from svsk_kernels.gpu.repack_sidecar import PlanarSidecar
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.naive import naive_matmul
from svsk_kernels.reference_kernel import ReferenceKernel, dequantize_layer
from svsk_kernels.sidecar_op import sidecar_matmul
from svsk_vllm.format import Codebook, ConfigGroup, LinearSpec, QuantizedLinear, unpack_codes
from svsk_vllm.plugin import split_kernel
from svsk_vllm.plugin.quantization_config import SvskConfig
from svsk_vllm.plugin.split_kernel import SplitKernel
from tests.support.format_builders import make_group, random_linear
from tests.support.simulated_cuda import on_gpu, simulated_cuda
from tests.support.unpack_gpu import unpack_base, unpack_scale, unpack_sidecar

GPU = torch.device("cuda", 0)
KERNELS = {
    torch.ops.svsk.matmul.default: dispatch._matmul,
    torch.ops.svsk.sidecar.default: sidecar_matmul,
}
K = 256
NAMES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
Make = Callable[[SvskConfig], torch.nn.Module]


def column(config: SvskConfig) -> torch.nn.Module:
    return vllm_linear.ColumnParallelLinear(
        K, 96, quant_config=config, prefix="m.fc1", params_dtype=torch.bfloat16
    )


def merged(config: SvskConfig) -> torch.nn.Module:
    return vllm_linear.MergedColumnParallelLinear(
        K,
        [96, 160],
        bias=False,
        quant_config=config,
        prefix="m.gate_up_proj",
        params_dtype=torch.bfloat16,
    )


def qkv(config: SvskConfig) -> torch.nn.Module:
    return vllm_linear.QKVParallelLinear(
        K, 32, 4, 2, quant_config=config, prefix="m.qkv_proj", params_dtype=torch.bfloat16
    )


def row(config: SvskConfig) -> torch.nn.Module:
    return vllm_linear.RowParallelLinear(
        K, 96, quant_config=config, prefix="m.down_proj", params_dtype=torch.bfloat16, bias=False
    )


LAYERS: dict[str, tuple[Make, list[tuple[int, int, int]]]] = {  # rows, rank and bits of each part
    "column": (column, [(96, 8, 4)]),
    "merged": (merged, [(96, 4, 8), (160, 6, 4)]),
    "qkv": (qkv, [(128, 8, 8), (64, 2, 4), (64, 0, 8)]),
    "row": (row, [(96, 3, 8)]),
    "no sidecar": (merged, [(96, 0, 8), (160, 0, 8)]),
}


@pytest.fixture(params=[(0, 1), (1, 2)], ids=["whole", "second of two ranks"])
def rank(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, int]]:
    for module in (vllm_linear, vllm_parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: request.param[0])
        monkeypatch.setattr(
            module, "get_tensor_model_parallel_world_size", lambda: request.param[1]
        )
    monkeypatch.setattr(dispatch, "_warmed", set())
    with set_current_vllm_config(VllmConfig()):
        yield request.param


def parts_of(kind: str, codebook: Codebook) -> list[QuantizedLinear]:
    prefix = {"column": "fc1", "row": "down_proj", "qkv": "qkv_proj"}.get(kind, "gate_up_proj")
    names = NAMES.get(prefix, [prefix])
    return [
        random_linear(
            LinearSpec(f"m.{name}", n, K, _group(rank, bits, codebook), torch.bfloat16), number
        )
        for number, (name, (n, rank, bits)) in enumerate(zip(names, LAYERS[kind][1], strict=True))
    ]


def _group(rank: int, bits: int, codebook: Codebook) -> ConfigGroup:
    return make_group(
        rank=rank, num_bits=bits, tile_m=48, tile_n=80 if rank == 6 else 96, codebook=codebook
    )


def config_of(linears: Sequence[QuantizedLinear]) -> SvskConfig:
    groups = {
        f"g{number}": (
            linear.spec.scheme.model_copy(update={"targets": (linear.spec.name,)}).model_dump(
                mode="json"
            )
        )
        for number, linear in enumerate(linears)
    }
    config = SvskConfig.from_config(
        {"quant_method": "svsk", "format": "svsk", "version": "1.0", "config_groups": groups}
    )
    config.packed_modules_mapping = NAMES
    return config


def build(kind: str, linears: Sequence[QuantizedLinear], device: torch.device) -> Any:
    """A layer as the engine leaves it.

    Made under the default device, loaded outside of it from CPU tensors.
    """
    with torch.device(device):
        layer: Any = LAYERS[kind][0](config_of(linears))
    shards: list[Any] = {"qkv": ["q", "k", "v"], "column": [None], "row": [None]}.get(kind, [0, 1])
    for shard, linear in zip(shards, linears, strict=True):
        for name, tensor in linear.to_tensors().items():
            parameter = getattr(layer, name.rpartition(".")[2])
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.copy_(torch.arange(len(layer.bias)))
    return layer


def parameters(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in layer.named_parameters()}


def output(layer: Any, device: torch.device) -> torch.Tensor:
    x = torch.randn(
        5, layer.input_size_per_partition, generator=torch.Generator().manual_seed(3), device="cpu"
    ).bfloat16()
    y: torch.Tensor = layer.quant_method.apply(layer, x.to(device), getattr(layer, "bias", None))
    assert y.device == device
    return y.cpu()


def expected_output(
    kind: str, linears: Sequence[QuantizedLinear], layer: Any, rank: tuple[int, int]
) -> torch.Tensor:
    """What this rank's part of the layer computes, in float64."""
    number, size = rank
    x = torch.randn(
        5, layer.input_size_per_partition, generator=torch.Generator().manual_seed(3), device="cpu"
    ).bfloat16()
    if kind == "row":
        wide = torch.zeros(5, K, dtype=torch.bfloat16)
        wide.unflatten(1, (size, -1))[:, number] = x
        y = naive_matmul(wide, linears[0].plain)
    else:
        y = torch.cat(
            [
                naive_matmul(x, linear.plain).unflatten(1, (size, -1))[:, number]
                for linear in linears
            ],
            1,
        )
    bias = getattr(layer, "bias", None)
    return y if bias is None else y + bias.detach().cpu().double()


class Products:
    """Stands for the launchers.

    Multiplies by the weight that the tensors on their device stand for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spec: LayerSpec | None = None
        self.kernels: list[str] = []
        monkeypatch.setattr(
            launch,
            "packed_matmul",
            lambda x, base, side, bits, bias, chosen, tiles: self(
                chosen.kernel, x, base, side, bits, bias
            ),
        )
        monkeypatch.setattr(
            launch,
            "matmul_folded",
            lambda x, base, side, bits, bias: self("fold", x, base, side, bits, bias),
        )

    def __call__(
        self,
        kernel: str,
        x: torch.Tensor,
        base: launch.Base,
        side: PlanarSidecar | None,
        bits: int,
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
        assert counters.device == x.device
        assert not counters.any()
        spec = self.spec
        packed = unpack_base(base.words, base.n, base.k, base.plane)
        scale = unpack_scale(base.scale, base.n, base.k // base.group_size)
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


@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_fused_layers(
    monkeypatch: pytest.MonkeyPatch, rank: tuple[int, int], kind: str, codebook: Codebook
) -> None:
    products = Products(monkeypatch)
    monkeypatch.setenv("SVSK_KERNEL", "fused")
    linears = parts_of(kind, codebook)

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
        launch.counters._tensors.pop(GPU)
    monkeypatch.setattr(TritonKernel, "obstacle", staticmethod(lambda *_: None))
    monkeypatch.setattr(choice, "CpuKernel", OnCpu)
    expected = run(torch.device("cpu"))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(found[2], expected[2])
    reference = expected_output(kind, linears, build(kind, linears, torch.device("cpu")), rank)
    assert float((found[2].double() - reference).norm() / reference.norm()) < 5e-3


class OnCpu(TritonKernel):
    """The Triton kernel in place of the CPU's own."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec, torch.device("cpu"))


@pytest.mark.parametrize("codebook", ["int4", "quad8"])
@pytest.mark.parametrize("kernel", ["split", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
    rank: tuple[int, int],
    kind: str,
    kernel: str,
    codebook: Codebook,
) -> None:
    """The layer as its dequantised weight, and in two parts."""
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    monkeypatch.setattr(
        split_kernel, "_vllm_kernel", lambda prefix, spec, shape, device: BaseProduct()
    )
    linears = parts_of(kind, codebook)
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
        launch.counters._tensors.pop(GPU)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(*outputs)
