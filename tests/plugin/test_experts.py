# SPDX-License-Identifier: Apache-2.0
"""Quantised experts without an engine: loading, ranks, the product, and refusals."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import routed_experts

from svsk_vllm.format import (
    ConfigGroup,
    LinearSpec,
    QuantizedLinear,
    SvskFormatError,
    TensorSpec,
    dequantize,
)
from svsk_vllm.plugin.experts_method import SvskExpertsMethod
from svsk_vllm.plugin.experts_stack import Projection
from svsk_vllm.plugin.quantization_config import SvskConfig
from tests.support.format_builders import make_group, random_linear

HIDDEN, INNER, EXPERTS = 128, 192, 4
PREFIX = "model.layers.0.mlp.experts"
SCHEMES = {
    "gate_proj": make_group(rank=3, codebook="quad8", tile_m=48, tile_n=80),
    "up_proj": make_group(rank=6, codebook="quad8", num_bits=4, tile_m=0, tile_n=0),
    "down_proj": make_group(group_size=32, scale_bits=6, rank=2, tile_m=48, tile_n=80),
}
SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Experts(torch.nn.Module):
    """Enough of vLLM's ``RoutedExperts`` to load it and to run it.

    Args:
        tp: tensor-parallel rank and size.
        ep: expert-parallel rank and size.
    """

    def __init__(self, tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.here = range(ep[0] * EXPERTS // ep[1], (ep[0] + 1) * EXPERTS // ep[1])
        self.expert_map = None
        if ep[1] > 1:
            places = [self._map_global_expert_id_to_local_expert_id(e) for e in range(EXPERTS)]
            self.expert_map = torch.tensor(places, dtype=torch.int32)
        self.global_num_experts = EXPERTS
        self.expert_map_manager = SimpleNamespace(num_fused_shared_experts=0)
        self.apply_router_weight_on_input = False
        self.moe_config: Any = SimpleNamespace(
            tp_rank=tp[0],
            tp_size=tp[1],
            hidden_dim=HIDDEN,
            intermediate_size=INNER,
            activation=SimpleNamespace(value="silu"),
            has_bias=False,
            is_lora_enabled=False,
            swiglu_limit=None,
        )

    def _map_global_expert_id_to_local_expert_id(self, number: int) -> int:
        return number - self.here.start if number in self.here else -1


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(scope="module")
def linears() -> dict[str, QuantizedLinear]:
    found = {}
    for expert in range(EXPERTS):
        for seed, (projection, group) in enumerate(SCHEMES.items()):
            n, k = (HIDDEN, INNER) if projection == "down_proj" else (INNER, HIDDEN)
            spec = LinearSpec(f"{PREFIX}.{expert}.{projection}", n, k, group, torch.bfloat16)
            found[spec.name] = random_linear(spec, 10 * expert + seed)
    return found


def build(
    linears: dict[str, QuantizedLinear],
    dtype: torch.dtype = torch.bfloat16,
    lost: str = "",
    **parallel: tuple[int, int],
) -> Any:
    """A layer as the engine leaves it."""
    layer: Any = Experts(**parallel)
    parts = [
        Projection(shard, tuple(f"{PREFIX}.{e}.{name}" for e in range(EXPERTS)), SCHEMES[name])
        for name, shard in SHARDS.items()
    ]
    gate, up, down = parts
    method: Any = SvskExpertsMethod(PREFIX, layer, (gate, up, down), counted=True)
    inner = INNER // layer.moe_config.tp_size
    method.create_weights(layer, len(layer.here), HIDDEN, inner, dtype, weight_loader=None)
    for name, linear in linears.items():
        number, projection = name.removeprefix(f"{PREFIX}.").split(".")
        for key, tensor in linear.to_tensors().items():
            stem = "w2" if projection == "down_proj" else "w13"
            parameter = getattr(layer, f"{stem}_{key.rpartition('.')[2]}")
            if key != lost:
                parameter.weight_loader(
                    param=parameter,
                    loaded_weight=tensor,
                    weight_name=key,
                    shard_id=SHARDS[projection],
                    expert_id=int(number),
                    return_success=True,
                )
    method.process_weights_after_loading(layer)
    layer.method = method
    return layer


def route(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    logits[:, 3] = -9  # never
    weights, ids = logits.softmax(-1).topk(2)
    return x, weights, ids


def expected(
    linears: dict[str, QuantizedLinear], x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """In float64, from the definition of the format."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(len(x)):
        for weight, expert in zip(weights[row].tolist(), ids[row].tolist(), strict=True):
            gate, up, down = (
                dequantize(linears[f"{PREFIX}.{expert}.{name}"]).double() for name in SCHEMES
            )
            inner = x[row].double()
            y[row] += weight * (down @ (F.silu(gate @ inner) * (up @ inner)))
    return y


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("kernel", ["auto", "portable", "reference"])
def test_experts_are_what_the_format_says(
    linears: dict[str, QuantizedLinear], monkeypatch: pytest.MonkeyPatch, kernel: str, tokens: int
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", kernel)
    layer = build(linears, torch.float32)
    x, weights, ids = route(tokens)
    y = layer.method.apply(layer, x, weights, ids)
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected(linears, x, weights, ids), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("way", ["tp", "ep"])
def test_the_parts_of_two_ranks_add_up(linears: dict[str, QuantizedLinear], way: str) -> None:
    x, weights, ids = route(24)
    parts = [build(linears, torch.float32, **{way: (rank, 2)}) for rank in range(2)]
    for part in parts:
        assert len(part.w2_weight_packed) == (EXPERTS if way == "tp" else EXPERTS // 2)
    y = sum(part.method.apply(part, x, weights, ids) for part in parts)
    torch.testing.assert_close(y.double(), expected(linears, x, weights, ids), rtol=2e-4, atol=2e-4)


def test_the_op_in_a_compiled_graph(linears: dict[str, QuantizedLinear]) -> None:
    """It promises the shape and strides that it gives, and has one key for one computation."""
    layer, again = build(linears), build(linears)
    assert layer.method.key == again.method.key
    x, weights, ids = route(5)
    x = x.bfloat16()
    tensors = (layer.method.gate_up.tensors(layer), layer.method.down.tensors(layer))
    torch.library.opcheck(
        torch.ops.svsk.experts.default,
        (x, weights, ids, None, *tensors, layer.method.key),
        test_utils=("test_schema", "test_faketensor"),
    )
    run = torch.compile(lambda *given: layer.method.apply(layer, *given) + 1, backend="eager")
    assert torch.equal(run(x, weights, ids), layer.method.apply(layer, x, weights, ids) + 1)
    nobody = layer.method.apply(layer, x[:0], weights[:0], ids[:0])
    assert nobody.shape == (0, HIDDEN)


def test_a_tensor_that_did_not_arrive_is_named(linears: dict[str, QuantizedLinear]) -> None:
    gone = f"{PREFIX}.2.up_proj.sidecar_v"
    with pytest.raises(SvskFormatError, match=re.escape(f"not loaded: {gone}")):
        build(linears, lost=gone)
    build(linears, lost=gone, ep=(0, 2))  # that expert is elsewhere


def test_a_rank_that_cuts_a_group_is_refused(linears: dict[str, QuantizedLinear]) -> None:
    with pytest.raises(
        SvskFormatError,
        match=r"each rank gets 48 of 192 features of every expert, .*--enable-expert-par",
    ):
        build(linears, tp=(0, 4))


def method_of(layer: Any, schemes: dict[str, ConfigGroup], ignore: tuple[str, ...] = ()) -> Any:
    """What the config says of a layer whose experts are stored by these schemes."""
    groups = {
        name: {**group.model_dump(mode="json"), "targets": [rf"re:.*\.{name}$"]}
        for name, group in schemes.items()
    }
    config = SvskConfig.from_config(
        {
            "quant_method": "svsk",
            "format": "svsk",
            "version": "1.1",
            "config_groups": groups,
            "ignore": list(ignore),
        }
    )
    return config.get_quant_method(layer, PREFIX)


def test_the_config_finds_the_experts() -> None:
    method = method_of(Experts(), SCHEMES)
    assert isinstance(method, SvskExpertsMethod)
    assert [part.scheme.sidecar.rank for part in method.parts] == [3, 6, 2]
    assert method.parts[2].names[3] == f"{PREFIX}.3.down_proj"
    assert method_of(Experts(), SCHEMES, ("re:.*experts.*",)) is None


def test_experts_that_are_stored_as_they_were_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    import svsk_vllm.plugin.quantization_config as module

    headers = {
        f"{PREFIX}.{e}.{name}.weight": TensorSpec(torch.bfloat16, (64, 64))
        for e in range(4)
        for name in SCHEMES
    }
    monkeypatch.setattr(module, "read_headers", lambda model, revision: headers)
    config = SvskConfig.from_config(
        {
            "quant_method": "svsk",
            "format": "svsk",
            "version": "1.0",
            "config_groups": {"group_0": {"targets": ["Linear"]}},
        }
    )
    config.maybe_update_config("folder")
    assert config.get_quant_method(Experts(), PREFIX) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": SimpleNamespace(value="swigluoai")}, "their activation is swigluoai"),
        ({"has_bias": True}, "they have biases"),
        ({"swiglu_limit": 7.0}, "their activation is clamped"),
        ({"is_lora_enabled": True}, "LoRA adapters are enabled"),
    ],
)
def test_what_is_not_served_is_refused(change: dict[str, Any], reason: str) -> None:
    layer = Experts()
    vars(layer.moe_config).update(change)
    with pytest.raises(
        SvskFormatError,
        match=f"and the other experts of {PREFIX}: {reason}.*svsk restore",
    ):
        method_of(layer, SCHEMES)


def test_experts_of_another_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import svsk_vllm.plugin.quantization_config as module

    groups = {
        name: {**group.model_dump(mode="json"), "targets": [rf"re:.*\.{name}$"]}
        for name, group in SCHEMES.items()
    }
    headers = {}
    for expert in range(EXPERTS):
        for projection, group in SCHEMES.items():
            stored = f"{PREFIX}.{expert}.{projection}"
            tensors = LinearSpec(stored, 64, 64, group).tensors()
            headers |= {f"{stored}.{suffix}": spec for suffix, spec in tensors.items()}
    monkeypatch.setattr(module, "read_headers", lambda model, revision: headers)
    config = SvskConfig.from_config(
        {"quant_method": "svsk", "format": "svsk", "version": "1.1", "config_groups": groups}
    )
    config.maybe_update_config("folder")
    message = r"0\.gate_proj\.weight_packed: holds a weight of 64 x 64, config\.json asks for"
    with pytest.raises(SvskFormatError, match=message):
        config.get_quant_method(Experts(), PREFIX)


def test_copies_of_experts_are_refused() -> None:
    """As ``--enable-eplb`` makes them: more experts in a layer than are stored."""
    layer = Experts()
    method = method_of(layer, SCHEMES)
    message = rf"{PREFIX}: vLLM holds 6 experts here, of which the checkpoint has 4: copies of"
    with pytest.raises(SvskFormatError, match=message):
        method.create_weights(layer, 6, HIDDEN, INNER, torch.bfloat16, weight_loader=None)


def test_a_gpu_is_refused_before_anything_is_loaded() -> None:
    with (
        torch.device("meta"),
        pytest.raises(
            SvskFormatError, match=r"served on CPUs only so far, not on meta.*svsk restore"
        ),
    ):
        method_of(Experts(), SCHEMES)


def test_a_vllm_that_would_load_sidecars_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.26 takes every tensor of three dimensions for a stack of experts."""
    monkeypatch.delattr(routed_experts, "_index_expert_mapping")
    with pytest.raises(SvskFormatError, match="would load it in pieces"):
        method_of(Experts(), SCHEMES)
    bare = {
        name: group.model_copy(update={"sidecar": group.sidecar.model_copy(update={"rank": 0})})
        for name, group in SCHEMES.items()
    }
    assert isinstance(method_of(Experts(), bare), SvskExpertsMethod)


def test_experts_of_several_schemes_are_refused() -> None:
    only = make_group(rank=7).model_copy(update={"targets": (rf"re:.*{PREFIX}.2.up_proj",)})
    groups = {
        name: {**group.model_dump(mode="json"), "targets": [rf"re:.*\.{name}$"]}
        for name, group in SCHEMES.items()
    }
    groups["other"] = {**only.model_dump(mode="json"), "targets": [f"{PREFIX}.2.up_proj"]}
    config = SvskConfig.from_config(
        {"quant_method": "svsk", "format": "svsk", "version": "1.1", "config_groups": groups}
    )
    with pytest.raises(SvskFormatError, match=r"experts\.0\.up_proj and .*experts\.2\.up_proj"):
        config.get_quant_method(Experts(), PREFIX)


def test_the_split_kernel_is_refused(
    linears: dict[str, QuantizedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVSK_KERNEL", "split")
    with pytest.raises(SvskFormatError, match="SVSK_KERNEL=split, which does not run experts"):
        build(linears)
