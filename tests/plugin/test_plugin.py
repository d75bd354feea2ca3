# SPDX-License-Identifier: Apache-2.0
"""The plugin without an engine: detection, refusals, and which method serves a layer."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

import svsk_vllm
from svsk_vllm.format import SvskFormatError, TensorSpec
from svsk_vllm.plugin.linear_method import SvskLinearMethod
from svsk_vllm.plugin.quantization_config import SvskConfig
from svsk_vllm.plugin.stored_names import StoredModules
from tests.support.format_builders import make_group

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def quantization_config(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "svsk",
        "format": "svsk",
        "version": "1.0",
        "config_groups": {"group_0": {"targets": ["Linear"]}},
        "ignore": ["lm_head"],
        **changes,
    }


def test_registration_is_idempotent_and_found_by_name() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    svsk_vllm.register()
    svsk_vllm.register()
    assert get_quantization_config("svsk") is SvskConfig


def test_entry_point_is_installed() -> None:
    from importlib.metadata import entry_points

    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "svsk"]
    assert [point.value for point in found] == ["svsk_vllm:register"]


def test_checkpoints_are_claimed_by_their_method_only() -> None:
    assert (
        SvskConfig.override_quantization_method({"quant_method": "svsk"}, None, hf_config=None)
        == "svsk"
    )
    assert (
        SvskConfig.override_quantization_method({"quant_method": "gptq"}, "svsk", hf_config=None)
        is None
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2.0"}, "version 2.0 is not readable"),
        ({"config_groups": {"g": {"targets": ["Linear"], "extra": 1}}}, "extra"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"group_size": 128}}}},
            "group_size",
        ),
    ],
)
def test_bad_configuration_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SvskFormatError, match=message):
        SvskConfig.from_config(quantization_config(**changes))


def test_fused_parts_with_different_bases_are_refused() -> None:
    schemes = [make_group(group_size=32), make_group(group_size=64), make_group(group_size=32)]
    with pytest.raises(SvskFormatError, match="group sizes, codebooks or scale_bits differ"):
        SvskLinearMethod("model.layers.0.self_attn.qkv_proj", QKV["qkv_proj"], schemes)


def test_shard_that_cuts_a_group_is_refused_with_the_remedy() -> None:
    method = SvskLinearMethod("model.layers.0.mlp.down_proj", ["down_proj"], [make_group()])
    with pytest.raises(
        SvskFormatError,
        match=r"down_proj: each rank gets 160 of 320 input features, .*--group-size 32",
    ):
        method.create_weights(
            torch.nn.Module(), 160, [64], 320, 64, torch.bfloat16, weight_loader=print
        )


class _Linear(torch.nn.Module):
    """Enough of a vLLM linear to ask for its method."""


@pytest.fixture
def linear_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    import svsk_vllm.plugin.quantization_config as module

    monkeypatch.setattr(module, "LinearBase", _Linear)
    with set_current_vllm_config(VllmConfig()):
        yield _Linear()


def test_methods_by_layer(linear_layer: torch.nn.Module) -> None:
    config = SvskConfig.from_config(
        quantization_config(ignore=["lm_head", "re:.*mlp.*", "model.layers.1.self_attn.k_proj"])
    )
    config.packed_modules_mapping = QKV
    method = config.get_quant_method(linear_layer, "model.layers.0.self_attn.qkv_proj")
    assert isinstance(method, SvskLinearMethod)
    assert method.parts == [
        f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")
    ]
    ignored = config.get_quant_method(linear_layer, "model.layers.0.mlp.down_proj")
    assert isinstance(ignored, UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Identity(), "model.norm") is None
    with pytest.raises(SvskFormatError, match=r"qkv_proj: vLLM fuses .*k_proj is not quantised"):
        config.get_quant_method(linear_layer, "model.layers.1.self_attn.qkv_proj")


class Mapper:
    """Stands for vLLM's, whose rules for prefixes end with a dot."""

    def apply_list(self, names: list[str]) -> list[str]:
        return [name.replace("model.", "language_model.model.", 1) for name in names]


def test_exact_names_are_translated_and_patterns_are_not(linear_layer: torch.nn.Module) -> None:
    ignored = ["model.layers.0.mlp.up_proj", r"re:model\.layers\.1\..*"]
    config = SvskConfig.from_config(quantization_config(ignore=ignored))
    config.apply_vllm_mapper(Mapper())
    name = "language_model.model.layers.0.mlp."
    assert isinstance(
        config.get_quant_method(linear_layer, f"{name}up_proj"), UnquantizedLinearMethod
    )
    assert isinstance(config.get_quant_method(linear_layer, f"{name}down_proj"), SvskLinearMethod)


HEADERS = {
    "model.layers.0.mlp.gate_up_proj.weight_packed": TensorSpec(torch.int32, (64, 8)),
    "model.layers.0.mlp.gate_up_proj.weight_scale": TensorSpec(torch.bfloat16, (64, 1)),
    "model.layers.0.self_attn.q_proj.weight": TensorSpec(torch.bfloat16, (64, 64)),
    "lm_head.weight": TensorSpec(torch.bfloat16, (64, 64)),
}


def test_stored_names_survive_prefixes_and_translation() -> None:
    stored = StoredModules(HEADERS, [Mapper().apply_list])
    own = "model.layers.0.mlp.gate_up_proj"
    for prefix in ("", "draft_model.", "."):
        assert stored.find(f"{prefix}language_model.{own}") == own
    assert stored.find(own) == own
    assert stored.find(".lm_head") == "lm_head"
    assert stored.find("model.layers.0.mlp.down_proj") is None
    assert stored.suffixes(own) == {"weight_packed", "weight_scale"}


def with_headers(
    config: SvskConfig, monkeypatch: pytest.MonkeyPatch, headers: dict[str, TensorSpec]
) -> None:
    import svsk_vllm.plugin.quantization_config as module

    monkeypatch.setattr(module, "read_headers", lambda model, revision: headers)
    config.maybe_update_config("folder")
    config.packed_modules_mapping = {**QKV, "gate_up_proj": ["gate_proj", "up_proj"]}


def test_what_is_stored_fused_or_dense_is_served_so(
    linear_layer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SvskConfig.from_config(quantization_config())
    with_headers(config, monkeypatch, HEADERS)
    method = config.get_quant_method(linear_layer, "draft_model.model.layers.0.mlp.gate_up_proj")
    assert isinstance(method, SvskLinearMethod)
    assert method.origin.names == ("model.layers.0.mlp.gate_up_proj",)
    dense = config.get_quant_method(linear_layer, "model.layers.0.self_attn.q_proj")
    assert isinstance(dense, UnquantizedLinearMethod)


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_missing_tensor_is_named_before_loading(
    linear_layer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    name = f"model.layers.0.mlp.gate_up_proj.{suffix}"
    config = SvskConfig.from_config(quantization_config())
    with_headers(config, monkeypatch, {key: spec for key, spec in HEADERS.items() if key != name})
    with pytest.raises(
        SvskFormatError, match=f"{re.escape(name)}: missing or no matrix. The checkpoint is"
    ):
        config.get_quant_method(linear_layer, "model.layers.0.mlp.gate_up_proj")


GATE_UP, Q_PROJ = "model.layers.0.mlp.gate_up_proj", "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("more", "changes", "layer", "message"),
    [
        (
            f"{GATE_UP}.weight",
            {},
            GATE_UP,
            r"stored both dense \(\.weight\) and quantised\. Remove",
        ),
        (
            "",
            {"ignore": [GATE_UP]},
            GATE_UP,
            r"stored quantised, but config\.json does not quantise it\. Correct the config",
        ),
        (
            "",
            {"config_groups": {"group_0": {"targets": [Q_PROJ]}}},
            Q_PROJ,
            rf"weight: stored as it was, but config\.json quantises {Q_PROJ}\. Add it to the",
        ),
    ],
)
def test_a_config_that_contradicts_what_is_stored_is_refused(
    linear_layer: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    more: str,
    changes: dict[str, Any],
    layer: str,
    message: str,
) -> None:
    config = SvskConfig.from_config(quantization_config(**changes))
    extra = {more: TensorSpec(torch.bfloat16, (64, 64))} if more else {}
    with_headers(config, monkeypatch, HEADERS | extra)
    with pytest.raises(SvskFormatError, match=message):
        config.get_quant_method(linear_layer, layer)


@pytest.mark.parametrize("load_format", ["sharded_state", "fastsafetensors"])
def test_states_that_vllm_saved_are_refused(load_format: str) -> None:
    config = SvskConfig.from_config(quantization_config())
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format))):
        if load_format == "sharded_state":
            with pytest.raises(
                SvskFormatError,
                match=r"^--load-format sharded_state reads states that vLLM saved, which it cannot",
            ):
                config.get_quant_method(torch.nn.Identity(), "model.norm")
        else:
            assert config.get_quant_method(torch.nn.Identity(), "model.norm") is None


def test_other_quantization_methods_are_refused() -> None:
    with pytest.raises(
        SvskFormatError, match="--quantization fp8: the checkpoint is quantised by svsk already"
    ):
        SvskConfig.override_quantization_method({"quant_method": "svsk"}, "fp8")
    with pytest.raises(
        SvskFormatError,
        match=r"config.json has no quantization_config, so its weights.*svsk quantize",
    ):
        SvskConfig()
