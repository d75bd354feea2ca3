# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers with the plugin's method, built and loaded as by the engine, without it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.parameter as vllm_parameter
from vllm.config import VllmConfig, set_current_vllm_config

from svsk_kernels.naive import naive_matmul
from svsk_vllm.format import Codebook, ConfigGroup, LinearSpec, QuantizedLinear
from svsk_vllm.format.group_scales import ScaleBits
from svsk_vllm.plugin.quantization_config import SvskConfig
from tests.support.format_builders import make_group, random_linear

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
    "qkv": (qkv, [(128, 131, 8), (64, 130, 4), (64, 0, 8)]),
    "row": (row, [(96, 3, 8)]),
    "no sidecar": (merged, [(96, 0, 8), (160, 0, 8)]),
}


@contextmanager
def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> Iterator[None]:
    """Layers that are built here are those of one of ``size`` ranks."""
    for module in (vllm_linear, vllm_parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    with set_current_vllm_config(VllmConfig()):
        yield


def parts_of(
    kind: str, codebook: Codebook, group_size: int = 64, scale_bits: ScaleBits = 16
) -> list[QuantizedLinear]:
    """Random linears that make up a layer."""

    def scheme(rank: int, bits: int) -> ConfigGroup:
        return make_group(
            group_size=group_size,
            scale_bits=scale_bits,
            rank=rank,
            num_bits=bits,
            tile_m=48,
            tile_n=80 if rank == 6 else 96,
            codebook=codebook,
        )

    prefix = {"column": "fc1", "row": "down_proj", "qkv": "qkv_proj"}.get(kind, "gate_up_proj")
    names = NAMES.get(prefix, [prefix])
    return [
        random_linear(LinearSpec(f"m.{name}", n, K, scheme(rank, bits), torch.bfloat16), number)
        for number, (name, (n, rank, bits)) in enumerate(zip(names, LAYERS[kind][1], strict=True))
    ]


def config_of(linears: Sequence[QuantizedLinear]) -> SvskConfig:
    """A configuration that names the linears one by one."""
    groups = {
        f"g{number}": (
            linear.spec.scheme.model_copy(update={"targets": (linear.spec.name,)}).model_dump(
                mode="json"
            )
        )
        for number, linear in enumerate(linears)
    }
    config = SvskConfig.from_config(
        {"quant_method": "svsk", "format": "svsk", "version": "1.1", "config_groups": groups}
    )
    config.packed_modules_mapping = NAMES
    return config


def build(kind: str, linears: Sequence[QuantizedLinear], device: torch.device) -> Any:
    """A layer as the engine leaves it.

    Made under the default device, loaded outside of it from CPU tensors.
    """
    with torch.device(device):
        layer: Any = LAYERS[kind][0](config_of(linears))
    load(kind, layer, linears)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.copy_(torch.arange(len(layer.bias)))
    return layer


def load(kind: str, layer: Any, linears: Sequence[QuantizedLinear], lost: str = "") -> None:
    """Hand the stored tensors to the parameters' loaders, as vLLM's models do, all but ``lost``."""
    shards: list[Any] = {"qkv": ["q", "k", "v"], "column": [None], "row": [None]}.get(kind, [0, 1])
    for shard, linear in zip(shards, linears, strict=True):
        for name, tensor in linear.to_tensors().items():
            if name != lost:
                parameter = getattr(layer, name.rpartition(".")[2])
                parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def parameters(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The layer's parameters on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in layer.named_parameters()}


def output(layer: Any, device: torch.device) -> torch.Tensor:
    """What the layer makes of five random rows, on the CPU."""
    x = torch.randn(
        5, layer.input_size_per_partition, generator=torch.Generator().manual_seed(3), device="cpu"
    ).bfloat16()
    y: torch.Tensor = layer.quant_method.apply(layer, x.to(device), getattr(layer, "bias", None))
    assert y.device == device
    return y.cpu()


def expected_output(
    kind: str, linears: Sequence[QuantizedLinear], layer: Any, rank: tuple[int, int]
) -> torch.Tensor:
    """What :func:`output` should be on this rank, in float64."""
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
