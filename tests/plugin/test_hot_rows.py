# SPDX-License-Identifier: Apache-2.0
"""Tables with hot rows while vLLM loads them: which rows a rank keeps, and what is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

import svsk_vllm
from svsk_vllm.format import (
    LinearSpec,
    QuantizedLinear,
    SvskCheckpointConfig,
    SvskFormatError,
    pack_codes,
)
from svsk_vllm.plugin.hot_rows import HotRows
from svsk_vllm.plugin.quantization_config import SvskConfig
from svsk_vllm.plugin.sidecar_loader import Arrived
from tests.plugin.test_arrival import observed_model
from tests.support.format_builders import EMBEDDING, make_group, random_linear
from tests.support.vllm_layers import LAYERS, as_rank, config_of, parts_of

K = 64


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    svsk_vllm.register()
    monkeypatch.setenv("SVSK_KERNEL", "portable")
    monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_world_size", lambda: 1)
    with as_rank(monkeypatch, 0, 1):
        yield


def table(n: int, hot_rows: int, seed: int = 0) -> QuantizedLinear:
    scheme = make_group(targets=[EMBEDDING], group_size=32, hot_rows=hot_rows)
    return random_linear(LinearSpec(EMBEDDING, n, K, scheme), seed)


def loaded(linear: QuantizedLinear, n: int, first: int, count: int) -> tuple[HotRows, Any]:
    """A layer of ``n`` rows that holds ``count`` rows of a table, its tensors in disorder."""
    layer = torch.nn.Module()
    arrived = Arrived({None: EMBEDDING}, [linear.spec.scheme])
    hot = HotRows(EMBEDDING, linear.spec, n, first, count)
    hot.register(layer, arrived)
    for name, tensor in reversed(linear.to_tensors().items()):
        parameter = getattr(layer, name.rpartition(".")[2])
        parameter.weight_loader(parameter, tensor)
    arrived.check(EMBEDDING)
    return hot, layer


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_rank_holds_its_rows_in_eight_bits(data: st.DataObject) -> None:
    """To the bit, whatever it holds: no hot row, none of the others, nothing at all."""
    total = data.draw(st.integers(2, 40))
    hot_rows = data.draw(st.integers(1, total - 1))
    first = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - first))
    padded = count + data.draw(st.integers(0, 3))
    linear = table(total, hot_rows, data.draw(st.integers(0, 99)))
    hot, layer = loaded(linear, padded, first, count)
    held = sum(len(parameter) for parameter in (layer.weight_packed, layer.weight_hot_packed))
    assert held <= count + 2 * hot_rows, "more than a rank can need"
    hot.join(layer, counted=True)
    assert {name for name, _ in layer.named_parameters()} == {"weight_packed", "weight_scale"}
    rows = slice(first, first + count)
    assert torch.equal(layer.weight_packed[:count], pack_codes(linear.codes[rows], 8))
    assert torch.equal(layer.weight_scale[:count], linear.scale[rows])
    assert not layer.weight_scale[count:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.flip(0), "embed_tokens.weight_hot_rows: names rows twice or not in asc"),
        (lambda rows: rows + 20, r"names rows .* expected 0 to 19\. The list is damaged: run"),
    ],
)
def test_a_list_that_is_none_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    linear = table(20, 6)
    hot, layer = loaded(linear, 20, 0, 20)
    layer.weight_hot_rows.data = change(layer.weight_hot_rows.data)
    with pytest.raises(SvskFormatError, match=message):
        hot.join(layer, counted=True)


def test_a_tensor_of_another_table_is_refused() -> None:
    layer = torch.nn.Module()
    linear = table(20, 6)
    scheme = linear.spec.scheme
    hot = HotRows(EMBEDDING, linear.spec, 20, 0, 20)
    hot.register(layer, Arrived({None: EMBEDDING}, [scheme]))
    parameter: Any = layer.weight_packed
    with pytest.raises(SvskFormatError, match=r"weight_packed: .* shape \[15, 8\].* \[14, 8\]"):
        parameter.weight_loader(parameter, table(21, 6).to_tensors()[f"{EMBEDDING}.weight_packed"])


def embedding(linear: QuantizedLinear) -> Any:
    checkpoint = SvskCheckpointConfig.model_validate(
        {
            "config_groups": {"table": linear.spec.scheme.model_dump(mode="json")},
            "embedding": {"module": EMBEDDING},
        }
    )
    return VocabParallelEmbedding(
        linear.spec.n,
        K,
        params_dtype=torch.bfloat16,
        quant_config=SvskConfig(checkpoint),
        prefix=EMBEDDING,
    )


@pytest.mark.parametrize("lost", ["weight_hot_rows", "weight_hot_scale", "weight_packed"])
def test_what_did_not_arrive_is_named(lost: str) -> None:
    linear = table(70, 6)
    layer = embedding(linear)
    for name, tensor in linear.to_tensors().items():
        parameter = getattr(layer, name.rpartition(".")[2])
        if not name.endswith(lost):
            parameter.weight_loader(parameter, tensor)
    with pytest.raises(SvskFormatError, match=rf"not loaded: model\.embed_tokens\.{lost}\."):
        layer.quant_method.process_weights_after_loading(layer)


def test_dummy_weights_are_served() -> None:
    """vLLM fills what is floating and leaves integers, the list too, as they are in memory."""
    linear = table(70, 6)
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = embedding(linear)
    layer.weight_hot_rows.data.fill_(-5)
    DummyModelLoader(LoadConfig()).load_weights(layer, None)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.embedding(layer, torch.tensor([0, 69])).isfinite().all()


def test_linears_of_blocks_have_none() -> None:
    linears = parts_of("column", "int4")
    raw = config_of(linears).checkpoint.to_dict()
    (group,) = raw["config_groups"].values()
    group["weights"]["hot_rows"], group["sidecar"] = 8, {"rank": 0}
    with pytest.raises(
        SvskFormatError, match=r"m\.fc1: config\.json gives it hot_rows, which only"
    ):
        LAYERS["column"][0](SvskConfig.from_config(raw))


def test_a_list_that_a_model_changes_is_refused() -> None:
    linear = table(20, 6)
    hot = HotRows(EMBEDDING, linear.spec, 20, 0, 20)
    model = observed_model(lambda t: t + 1)
    hot.register(model.layer, Arrived({None: EMBEDDING}, [linear.spec.scheme]))
    model.suffix = "weight_hot_rows"
    model.load = model.layer.weight_hot_rows.weight_loader
    rows = linear.to_tensors()[f"{EMBEDDING}.weight_hot_rows"]
    message = (
        rf"vLLM's loader for this architecture changes it before {EMBEDDING} gets it\. Quantise"
        " with --head int8 --embedding int8"
    )
    with pytest.raises(SvskFormatError, match=message):
        model.load_weights(iter([(f"{EMBEDDING}.weight_hot_rows", rows)]))
