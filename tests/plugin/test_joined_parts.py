# SPDX-License-Identifier: Apache-2.0
"""Stored tensors that fill several parts of a fused layer of vLLM, as Qwen3.5's ``in_proj_qkv``."""

import re
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.linear as vllm_linear

from svsk_kernels.naive import naive_matmul
from svsk_vllm.format import LinearSpec, QuantizedLinear, SvskFormatError
from svsk_vllm.plugin.linear_method import Origin, SvskLinearMethod
from svsk_vllm.plugin.quantization_config import SvskConfig
from tests.support.format_builders import make_group, random_linear
from tests.support.vllm_layers import as_rank

K = 128
SIZES = [64, 64, 96, 96]
"""Of q, k, v and z."""
PARTS = {"m.in_proj_qkv": (224, 4, (0, 1, 2)), "m.in_proj_z": (96, 3, 3)}
"""Rows, rank, and the shards that vLLM loads it into."""


@pytest.fixture(scope="module")
def linears() -> list[QuantizedLinear]:
    return [
        random_linear(
            LinearSpec(
                name,
                rows,
                K,
                make_group(rank=rank, tile_m=48, tile_n=80, codebook="quad8", scale_bits=6),
                torch.bfloat16,
            ),
            seed,
        )
        for seed, (name, (rows, rank, _)) in enumerate(PARTS.items())
    ]


class Config(SvskConfig):
    """Gives every layer one method."""

    def __init__(self, method: SvskLinearMethod) -> None:
        self.method = method

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> SvskLinearMethod:
        return self.method


def build(linears: list[QuantizedLinear], sizes: list[int] = SIZES, lost: str = "") -> Any:
    names, specs = list(PARTS), tuple(linear.spec for linear in linears)
    method = SvskLinearMethod(
        "m.in_proj_qkvz", names, [spec.scheme for spec in specs], Origin(tuple(names), specs)
    )
    layer: Any = vllm_linear.MergedColumnParallelLinear(
        K, sizes, bias=False, quant_config=Config(method), params_dtype=torch.float32
    )
    for linear in linears:
        shard = PARTS[linear.spec.name][2]
        for name, tensor in linear.to_tensors().items():
            if name != lost:
                parameter = getattr(layer, name.rpartition(".")[2])
                parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_each_rank_has_its_rows_of_every_part(
    monkeypatch: pytest.MonkeyPatch, linears: list[QuantizedLinear], rank: int, size: int
) -> None:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    whole = torch.cat([naive_matmul(x, linear.plain) for linear in linears], dim=1)
    parts = [part.chunk(size, dim=1)[rank] for part in whole.split(SIZES, dim=1)]
    with as_rank(monkeypatch, rank, size):
        layer = build(linears)
        y = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(y.double(), torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_what_is_not_there_is_named_once(
    monkeypatch: pytest.MonkeyPatch, linears: list[QuantizedLinear]
) -> None:
    for lost in ("weight_packed", "sidecar_u"):
        gone = f"m.in_proj_qkv.{lost}"
        with (
            as_rank(monkeypatch, 0, 1),
            pytest.raises(SvskFormatError, match=rf"not loaded: {re.escape(gone)}\."),
        ):
            build(linears, lost=gone)


def test_sizes_that_do_not_add_up_are_refused(
    monkeypatch: pytest.MonkeyPatch, linears: list[QuantizedLinear]
) -> None:
    with (
        as_rank(monkeypatch, 0, 1),
        pytest.raises(SvskFormatError, match="which the plugin does not know"),
    ):
        build(linears, [64, 96, 96, 64])


def test_rows_that_vllm_repeats_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of a Mamba mixer that are fewer than ranks."""
    spec = LinearSpec("m.in_proj", 96, K, make_group(), torch.bfloat16)
    method = SvskLinearMethod(
        "m.in_proj", [spec.name], [spec.scheme], Origin((spec.name,), (spec,))
    )
    with (
        as_rank(monkeypatch, 0, 2),
        pytest.raises(SvskFormatError, match=r"a copy of some of its rows \(128 of 96; .*--ignore"),
    ):
        vllm_linear.ColumnParallelLinear(
            K, 128, bias=False, quant_config=Config(method), params_dtype=torch.float32
        )
