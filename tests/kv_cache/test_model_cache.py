# SPDX-License-Identifier: Apache-2.0
"""Whole models on such caches: attention reads what was stored, in a prefill too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from svsk_eval.text.models import load_model
from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache import KvKinds, PerChannelKeys, check_filled, model_cache
from svsk_vllm.kv_cache.rounding import q4_1
from tests.kv_cache.plain import plain_cache
from tests.support.tiny_models import FAMILIES, MORE_FAMILIES, VOCAB, write_dense

TOKENS = 100
WINDOW = 64
LINEAR = "LinearAttentionLayer"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(
            input_ids=ids, past_key_values=cache, use_cache=cache is not None
        ).logits
    return result


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3"])
def test_attention_reads_what_was_stored(
    family: str, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the model without a cache, whose attention function rounds what it is given."""
    model = load_model(write_dense(tmp_path / family, family), "float32", "cpu")
    exact = logits(model, ids)
    cache = model_cache(model.config, KvKinds.parse("kpc32"))
    given = logits(model, ids, cache)
    check_filled(cache, TOKENS)
    plain, rounded = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        assert key.shape[1] == 2 < query.shape[1] == 4, "grouped queries"
        rounded.append(key)
        return plain(module, query, plain_cache(key), q4_1(value), *rest, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    expected = logits(model, ids)
    assert len(rounded) == 2
    torch.testing.assert_close(given, expected, rtol=0, atol=2e-5)
    assert float((given - exact).abs().max()) > 1e-3
    assert float((given - exact)[:, :20].abs().max()) > 1e-3, "early queries read stored keys too"


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gemma3", "exaone4", "falcon", "bloom"])
def test_a_cache_that_rounds_nothing_changes_nothing(
    family: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_model(write_dense(tmp_path / family, family), "float32", "cpu")
    cache = model_cache(model.config, KvKinds.parse("raw"))
    torch.testing.assert_close(logits(model, ids, cache), logits(model, ids), rtol=0, atol=1e-5)
    check_filled(cache, TOKENS)
    windows = getattr(model.config, "sliding_window", None)
    assert (windows == WINDOW) == (family in ("gemma2", "gemma3", "exaone4"))


def test_parts_of_a_text_see_the_same_past(ids: torch.Tensor, tmp_path: Path) -> None:
    """In parts of whole blocks every query reads what it does at once; else newest keys are raw.

    In float64: products of other shapes round otherwise, and a key at a border of two codes would
    take the other.
    """
    model = load_model(write_dense(tmp_path / "gemma3", "gemma3"), torch.float64, "cpu")
    stored, raw = KvKinds.parse("kpc32"), KvKinds.parse("raw:q4_1")
    whole = logits(model, ids[:, :96], model_cache(model.config, stored))
    cache = model_cache(model.config, stored)
    parts = [logits(model, ids[:, start : start + 32], cache) for start in (0, 32, 64)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    cache = model_cache(model.config, stored)
    each = torch.cat([logits(model, ids[:, at : at + 1], cache) for at in range(31)], 1)
    newest = logits(model, ids[:, :31], model_cache(model.config, raw))
    torch.testing.assert_close(each, newest, rtol=0, atol=1e-9)
    assert float((each - whole[:, :31]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "lookup"],
)
@pytest.mark.parametrize("kind", ["raw", "kpc32", "int4"])
def test_generate(how: dict[str, Any], kind: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model: Any = load_model(write_dense(tmp_path / "qwen2", "qwen2"), "float32", "cpu")
    asked = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **how}
    cache = model_cache(model.config, KvKinds.parse(kind))
    given = model.generate(ids[:1, :30], past_key_values=cache, **asked)
    assert given.shape == (1, 70)
    if kind == "raw":
        assert torch.equal(given, model.generate(ids[:1, :30], **asked))
    if kind == "kpc32" and not how:
        layer: Any = cache.layers[0]
        assert isinstance(layer, PerChannelKeys)
        assert layer.packed.shape[-3] == 2
        assert layer.keys.shape[-2] == 5


def test_other_caches_are_refused() -> None:
    hybrid = AutoConfig.for_model(
        "qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )
    with pytest.raises(
        SvskError, match=rf"--kv kpc32:q4_1: layer 0 of this qwen3_next .* {LINEAR}"
    ):
        model_cache(hybrid, KvKinds.parse("kpc32"))
    windows = AutoConfig.for_model("qwen2", num_hidden_layers=1, layer_types=["window_attention"])
    with pytest.raises(
        SvskError,
        match="this qwen2 model has layers of type 'window_attention', which are no plain",
    ):
        model_cache(windows, KvKinds.parse("int4"))
    latent = AutoConfig.for_model("deepseek_v3", num_hidden_layers=2)
    with pytest.raises(SvskError, match=r"latent attention \(kv_lora_rank = 512\)"):
        model_cache(latent, KvKinds.parse("int4"))


def test_a_model_that_ignores_the_cache_is_found() -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"].hf_config)
    cache = model_cache(config, KvKinds.parse("kpc32"))
    states = torch.zeros(1, 2, 5, 32)
    cache.update(states, states, 0)
    with pytest.raises(SvskError, match="stored 0 of 5 tokens in layer 1"):
        check_filled(cache, 5)
    cache.update(states, states, 1)
    check_filled(cache, 5)


def test_a_window_keeps_every_token(ids: torch.Tensor) -> None:
    config = AutoConfig.for_model("gemma2", **MORE_FAMILIES["gemma2"].hf_config)
    cache = model_cache(config, KvKinds.parse("kpc32"))
    assert [type(layer) for layer in cache.layers] == [PerChannelKeys] * 2
