# SPDX-License-Identifier: Apache-2.0
"""What the demo asks of vLLM; `make demo` itself takes minutes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from svsk_eval import demo
from svsk_eval.errors import EvalError


@pytest.mark.parametrize(
    ("features", "dtype"), [("avx2", "float32"), ("avx512", "float32"), ("", "auto")]
)
def test_both_models_are_served_in_a_dtype_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, features: str, dtype: str
) -> None:
    monkeypatch.setenv("SVSK_CPU_FEATURES", features)
    monkeypatch.delenv("SVSK_KERNEL", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    if not features:
        monkeypatch.setattr("svsk_eval.text.engine_args.has_bf16_products", lambda: True)
    asked: list[tuple[str, str]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        *_, model, chosen, _, target = command
        asked.append((model, chosen))
        assert "SVSK_KERNEL" not in env
        Path(target).write_text(json.dumps(["answer"] * len(demo.PROMPTS)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", run)
    demo.answer_both(tmp_path / "dense", tmp_path / "svsk", 4)
    assert asked == [(str(tmp_path / "dense"), dtype), (str(tmp_path / "svsk"), dtype)]


def test_what_vllm_says_when_it_cannot_serve_is_one_line_and_a_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed = "Traceback (most recent call last):\n  ...\nValueError: no room\n\n"
    monkeypatch.setattr(
        demo.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, stderr=printed),
    )
    with pytest.raises(
        EvalError,
        match=r"could not serve .*dense: ValueError: no room \(all it printed is in .*\.log\)",
    ):
        demo.answer_both(tmp_path / "dense", tmp_path / "svsk", 4)
    assert (tmp_path / "dense-vllm.log").read_text() == printed
