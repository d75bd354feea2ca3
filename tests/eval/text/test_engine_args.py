# SPDX-License-Identifier: Apache-2.0
"""Arguments of the engine that scores a text."""

from typing import Any

import pytest
import torch

from svsk_eval.errors import EvalError
from svsk_eval.text.engine_args import engine_arguments, parse_engine_args, served_dtype


@pytest.mark.parametrize(
    ("seq_len", "together", "step"),
    [(512, 2, 1024), (32, 32, 1024), (700, 1, 701), (4096, 1, 1024)],
)
def test_settings_of_the_engine(seq_len: int, together: int, step: int) -> None:
    """A step holds 1,024 tokens at most, and no more requests than fit it."""
    arguments = engine_arguments("m", seq_len, "bfloat16", {"tensor_parallel_size": 2})
    assert arguments == {
        "model": "m",
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "max_model_len": seq_len + 1,
        "max_num_seqs": together,
        "max_num_batched_tokens": step,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    wider = engine_arguments("m", 512, "float16", {"max_num_batched_tokens": 4096})
    assert (wider["max_num_seqs"], wider["max_num_batched_tokens"], wider["dtype"]) == (
        8,
        4096,
        "float16",
    )
    fewer = engine_arguments("m", 128, "auto", {"max_num_seqs": 2})
    assert (fewer["max_num_seqs"], fewer["max_num_batched_tokens"]) == (2, 258)


def test_auto_is_float32_where_nothing_multiplies_sixteen_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("SVSK_CPU_FEATURES", "avx2")
    assert [served_dtype(dtype) for dtype in ("auto", "bfloat16")] == ["float32", "bfloat16"]
    assert engine_arguments("m", 64, "auto", {})["dtype"] == "float32"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert served_dtype("auto") == "auto"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("svsk_eval.text.engine_args.has_bf16_products", lambda: True)
    assert served_dtype("auto") == "auto"


@pytest.mark.parametrize(
    ("dtype", "given", "message"),
    [
        ("fp8", {}, "--dtype fp8: vLLM takes auto, float32, bfloat16, float16"),
        (
            "auto",
            {"enable_prefix_caching": True},
            "enable_prefix_caching: cannot be set, a cached prefix has no",
        ),
        ("auto", {"max_model_len": 9}, "it follows from --seq-len"),
        ("auto", {"max_num_seqs": 0}, "max_num_seqs=0: expected a whole number"),
        (
            "auto",
            {"max_num_batched_tokens": "1k"},
            "max_num_batched_tokens=1k: expected a whole number",
        ),
        ("auto", {"max_num_seqs": True}, "max_num_seqs=True: expected a whole number"),
    ],
)
def test_settings_that_would_spoil_the_figures_are_refused(
    dtype: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        engine_arguments("m", 64, dtype, given)


def test_engine_arguments_are_json_or_words() -> None:
    texts = [
        "tensor_parallel_size=2",
        "gpu_memory_utilization=0.8",
        "enforce_eager=true",
        "kv_cache_dtype=fp8_e4m3",
    ]
    texts += ['compilation_config={"level": 3}', "revision=a=b", 'load_format="auto"']
    assert parse_engine_args(texts) == {
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.8,
        "enforce_eager": True,
        "kv_cache_dtype": "fp8_e4m3",
        "compilation_config": {"level": 3},
        "revision": "a=b",
        "load_format": "auto",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["enforce_eager"], "enforce_eager: expected name=value"),
        (["tensor-parallel-size=2"], "tensor-parallel-size=2: expected name=value"),
        (["gpu_memory_utilization=0,8"], "is not JSON"),
        (["enforce_eager=True"], "is not JSON"),
        (["swap=NaN"], "is not JSON"),
        (['a={"b": '], "is not JSON"),
        (["a="], "is not JSON"),
        (["a=1", "a=2"], "--engine-arg a: given twice. Give it once"),
    ],
)
def test_engine_arguments_of_another_form_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        parse_engine_args(texts)
