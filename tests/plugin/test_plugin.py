# SPDX-License-Identifier: Apache-2.0
"""The plugin without an engine: detection, refusals, and the layout of sharded sidecars."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

import svsk_vllm
from svsk_kernels.naive import naive_sidecar
from svsk_kernels.sidecar_op import prepare_sidecar, sidecar_matmul
from svsk_vllm.format import (
    ConfigGroup,
    LinearSpec,
    QuantizedLinear,
    SvskFormatError,
    TensorSpec,
    pack_factors,
)
from svsk_vllm.plugin.arrival import LinearRecord, expect
from svsk_vllm.plugin.linear_method import SvskLinearMethod
from svsk_vllm.plugin.quantization_config import SvskConfig
from svsk_vllm.plugin.row_order import stored_row_order
from svsk_vllm.plugin.shard_probe import ShardId
from svsk_vllm.plugin.sidecar_layout import build_layout
from svsk_vllm.plugin.sidecar_loader import (
    SIDECAR_DTYPES,
    Arrived,
    StoredBase,
    base_loader,
    tile_loader,
)
from svsk_vllm.plugin.stored_names import StoredModules
from tests.support.format_builders import make_group, property_test, random_linear

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


def test_what_did_not_arrive_is_named_and_counts_start_anew() -> None:
    arrived = Arrived({"q": "m.q_proj", "k": "m.k_proj"}, [make_group(rank=4), make_group(rank=0)])
    for _ in range(2):
        for name in ("weight_packed", "weight_scale"):
            arrived.note(name, ("q", "k"))
        arrived.note("sidecar_u", ("q",))
        arrived.note("sidecar_v", ("q",))
        with pytest.raises(
            SvskFormatError,
            match=r"m\.qkv_proj: not loaded: m\.q_proj\.sidecar_gain\. .* or does not fit its",
        ):
            arrived.check("m.qkv_proj")


@pytest.mark.parametrize(
    "settings",
    [
        {"new_decoder_architecture": False, "multi_query": False},
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
)
def test_falcon_rows_are_followed(settings: dict[str, Any]) -> None:
    """Queries first, then keys, then values, from rows stored by groups of heads."""
    from transformers import FalconConfig

    config = FalconConfig(hidden_size=32, num_attention_heads=4, **settings)
    groups = (
        {False: 4, True: 1}[config.multi_query]
        if not config.new_decoder_architecture
        else config.num_kv_heads
    )
    rows = torch.arange((4 + 2 * groups) * 8).view(groups, 4 // groups + 2, 8)
    expected = torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])
    found = stored_row_order(
        "FalconForCausalLM", config, "h.0.self_attention.query_key_value", len(expected)
    )
    assert found is not None
    assert torch.equal(found, expected)
    assert (
        stored_row_order("LlamaForCausalLM", config, "model.layers.0.self_attn.q_proj", 8) is None
    )


class _Fused(torch.nn.Module):
    """A model whose loader moves rows, splits, or passes on what it is given."""

    def __init__(
        self, change: Callable[[torch.Tensor], torch.Tensor], order: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.change, self.config, self.suffix = change, None, "weight_packed"
        self.load: Callable[..., None]
        self.layer = torch.nn.Module()
        self.layer.weight_packed = torch.nn.Parameter(
            torch.zeros(8, 2, dtype=torch.int32), requires_grad=False
        )
        self.layer.norm = torch.nn.Parameter(torch.zeros(2))
        self.arrived = Arrived({None: "layer"}, [make_group(rank=0)])
        self.load = base_loader(
            "layer",
            "weight_packed",
            lambda param, w: param.data.copy_(w),
            self.arrived,
            order,
            StoredBase(make_group().weights, 1),
            keep=True,
            whole=True,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name.endswith(self.suffix):
                self.load(getattr(self.layer, self.suffix), self.change(tensor))
            loaded.add(name)
        return loaded


def observed_model(
    change: Callable[[torch.Tensor], torch.Tensor], order: torch.Tensor | None = None
) -> Any:
    model = _Fused(change, order)
    layer = model._modules.pop("layer")
    assert layer is not None
    expect(layer, LinearRecord((None,), frozenset({"weight_packed"})))
    model.layer = layer  # the registration is what is observed
    return model


WORDS = torch.arange(16, dtype=torch.int32).view(8, 2)


@pytest.mark.parametrize(
    ("change", "order", "right"),
    [
        (lambda t: t, None, True),
        (lambda t: t.clone(), None, True),
        (lambda t: t.flip(0), None, False),
        (lambda t: t.flip(0), torch.arange(8).flip(0), True),
        (lambda t: t, torch.arange(8).flip(0), False),
        (lambda t: t[:4].repeat(2, 1), None, False),
    ],
)
def test_rows_that_a_model_moves_are_noticed(
    change: Any, order: torch.Tensor | None, right: bool
) -> None:
    model = observed_model(change, order)
    weights = [("layer.weight_packed", WORDS.clone()), ("layer.norm", torch.ones(2))]
    if right:
        assert model.load_weights(iter(weights)) == {name for name, _ in weights}
    else:
        with pytest.raises(
            SvskFormatError, match=r"layer\.weight_packed: vLLM's loader .* changes its rows"
        ):
            model.load_weights(iter(weights))


def test_codes_of_another_dtype_are_refused() -> None:
    model = observed_model(lambda t: t)
    message = (
        r"weight_packed: values of dtype torch\.int64, expected torch\.int32\. Run `svsk validate"
    )
    with pytest.raises(SvskFormatError, match=message):
        model.load_weights(iter([("layer.weight_packed", WORDS.long())]))


def test_a_sidecar_that_a_model_changes_is_refused() -> None:
    scheme = make_group(rank=4, tile_m=16, tile_n=32, group_size=32)
    layout = build_layout(
        "layer", [(None, scheme)], lambda _: torch.arange(32), lambda _: torch.arange(64), 64, 32
    )
    assert layout is not None
    model = observed_model(lambda t: t.flip(0))
    model.suffix, model.load = "sidecar_gain", tile_loader("layer", "sidecar_gain", layout, 64)
    model.layer.sidecar_gain = torch.nn.Parameter(layout.plan.zeros()[2], requires_grad=False)
    gain = torch.arange(16.0).view(2, 2, 4)
    message = (
        r"layer\.sidecar_gain: vLLM's loader for this architecture changes it before layer gets it"
        r"\. Quantise the module without a sidecar"
    )
    with pytest.raises(SvskFormatError, match=message):
        model.load_weights(iter([("layer.sidecar_gain", gain)]))


def test_a_dense_tensor_that_nothing_fills_is_named() -> None:
    model = observed_model(lambda t: t)
    model.bare = torch.nn.LayerNorm(2, bias=False)
    with pytest.raises(SvskFormatError, match=r"lacks what vLLM loads into bare\.weight\."):
        model.load_weights([("layer.weight_packed", WORDS.clone()), ("layer.norm", torch.ones(2))])


def load_sharded(
    linears: Sequence[QuantizedLinear], rank: int, size: int, *, by_columns: bool
) -> tuple[torch.Tensor, ...] | None:
    """Run-time tensors and plan of one rank of a fused layer, or of a row-parallel one."""
    k = linears[0].spec.k
    shards: list[tuple[ShardId, ConfigGroup]] = [
        (index if len(linears) > 1 else None, linear.spec.scheme)
        for index, linear in enumerate(linears)
    ]
    counts = [linear.spec.n // (1 if by_columns else size) for linear in linears]
    starts = [0, *itertools.accumulate(counts)]

    def rows_of(shard: ShardId) -> torch.Tensor:
        index = int(shard or 0)
        rows = torch.full((starts[-1],), -1)
        first = 0 if by_columns else rank * counts[index]
        rows[starts[index] : starts[index + 1]] = torch.arange(first, first + counts[index])
        return rows

    def columns_of(shard: ShardId) -> torch.Tensor:
        width = k // size
        return torch.arange(rank * width, (rank + 1) * width) if by_columns else torch.arange(k)

    layout = build_layout("layer", shards, rows_of, columns_of, k, starts[-1])
    if layout is None:
        return None
    tensors = dict(zip(SIDECAR_DTYPES, layout.plan.zeros(), strict=True))
    for (shard, _), linear in zip(shards, linears, strict=True):
        if linear.u is None or linear.v is None or linear.gain is None:
            continue
        bits = linear.spec.factor_bits
        stored = {
            "sidecar_u": pack_factors(linear.u, bits),
            "sidecar_v": pack_factors(linear.v, bits),
            "sidecar_gain": linear.gain,
        }
        for name, data in tensors.items():
            parameter = torch.nn.Parameter(data, requires_grad=False)
            arguments = () if shard is None else (shard,)
            tile_loader("layer", name, layout, k)(parameter, stored[name], *arguments)
    return *tensors.values(), torch.tensor(layout.plan.encode())


part = st.tuples(
    st.integers(1, 12).map(lambda n: 8 * n),  # rows
    st.sampled_from([0, 2, 4, 6, 130]),  # rank
    st.sampled_from([0, 5, 16, 48]),  # tile_m
    st.sampled_from([0, 24, 32, 40, 100]),  # tile_n
    st.sampled_from([4, 8]),  # bits
)


@property_test
@given(
    parts=st.lists(part, min_size=1, max_size=3),
    size=st.sampled_from([1, 2, 4]),
    by_columns=st.booleans(),
)
def test_ranks_add_up_to_the_whole_layer(
    parts: list[tuple[int, int, int, int, int]], size: int, by_columns: bool
) -> None:
    """Any tiles against any shard boundary.

    Outputs side by side, or partial outputs summed, are the reference's.
    """
    parts = parts[:1] if by_columns else parts
    k = 128
    linears = [
        random_linear(
            LinearSpec(
                f"p{index}",
                n,
                k,
                make_group(rank=r, tile_m=m, tile_n=t, num_bits=bits, group_size=32),
            ),
            index,
        )
        for index, (n, r, m, t, bits) in enumerate(parts)
    ]
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(7))
    expected = torch.cat([naive_sidecar(x, linear.plain) for linear in linears], 1)
    pieces = []
    for rank in range(size):
        loaded = load_sharded(linears, rank, size, by_columns=by_columns)
        if loaded is None:
            assert not expected.any()
            return
        u, v, gain, plan = loaded
        own = x[:, rank * k // size : (rank + 1) * k // size] if by_columns else x
        pieces.append(
            sidecar_matmul(own, *prepare_sidecar(u, v, gain, own.dtype), plan.tolist()).double()
        )
    if by_columns:
        actual = torch.stack(pieces).sum(0)
    else:  # each rank holds its share of every part
        counts = [linear.spec.n // size for linear in linears]
        split = [piece.split(counts, 1) for piece in pieces]
        actual = torch.cat(
            [torch.cat([s[index] for s in split], 1) for index in range(len(linears))], 1
        )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_loader_names_what_does_not_fit() -> None:
    linear = random_linear(
        LinearSpec("p", 32, 64, make_group(rank=4, tile_m=16, tile_n=32, group_size=32))
    )
    shards: list[tuple[ShardId, ConfigGroup]] = [(None, linear.spec.scheme)]
    layout = build_layout(
        "layer", shards, lambda _: torch.arange(32), lambda _: torch.arange(64), 64, 32
    )
    assert layout is not None
    gain = torch.nn.Parameter(layout.plan.zeros()[2], requires_grad=False)
    with pytest.raises(
        SvskFormatError, match=r"layer\.sidecar_gain: the checkpoint holds shape \[2, 2, 5\]"
    ):
        tile_loader("layer", "sidecar_gain", layout, 64)(gain, torch.zeros(2, 2, 5))
    with pytest.raises(SvskFormatError, match=r"loads it in parts \('q'\).*packed_modules_mapping"):
        tile_loader("layer", "sidecar_gain", layout, 64)(gain, torch.zeros(2, 2, 4), "q")
    only_q = build_layout(
        "layer",
        [("q", linear.spec.scheme)],
        lambda _: torch.arange(32),
        lambda _: torch.arange(64),
        64,
        32,
    )
    assert only_q is not None
    message = (
        r"layer\.sidecar_gain: loaded for part 'v', but by config\.json there are sidecars for"
    )
    with pytest.raises(SvskFormatError, match=message):
        tile_loader("layer", "sidecar_gain", only_q, 64)(gain, torch.zeros(2, 2, 4), "v")


def test_scattered_columns_are_refused() -> None:
    shards: list[tuple[ShardId, ConfigGroup]] = [(None, make_group(rank=4, group_size=32))]
    with pytest.raises(SvskFormatError, match="columns that do not follow each other"):
        build_layout(
            "layer", shards, lambda _: torch.arange(8), lambda _: torch.arange(64).flip(0), 64, 8
        )


def test_probes_stay_on_the_cpu_whatever_the_default_device() -> None:
    """The engine builds a model with the accelerator as the default device.

    Meta stands for one here.
    """
    shards: list[tuple[ShardId, ConfigGroup]] = [
        (None, make_group(rank=4, tile_m=16, tile_n=32, group_size=32))
    ]
    rows, columns = torch.arange(32), torch.arange(64)
    with torch.device("meta"):
        layout = build_layout("layer", shards, lambda _: rows, lambda _: columns, 64, 32)
    assert layout == build_layout("layer", shards, lambda _: rows, lambda _: columns, 64, 32)
