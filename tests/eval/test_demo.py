# SPDX-License-Identifier: Apache-2.0
"""What the demo asks of vLLM; `make demo` itself takes minutes."""

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
    served: list[tuple[str, str]] = []

    def run_request(module: str, request: Any, folder: Path, name: str, report: Any) -> None:
        assert module == "svsk_eval.demo_answers"
        served.append((str(request.model), request.dtype))
        report({"answers": ["answer"] * len(request.prompts)})

    monkeypatch.setattr(demo, "run_request", run_request)
    demo.answer_both(tmp_path / "dense", tmp_path / "svsk", 4)
    assert served == [(str(tmp_path / "dense"), dtype), (str(tmp_path / "svsk"), dtype)]


@pytest.mark.slow
def test_a_model_that_cannot_be_served_ends_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(
        EvalError,
        match=r"(?s)none: its process failed \(exit code 1\)\. The end of .*log\.txt:.*none",
    ):
        demo.answer_both(tmp_path / "none", tmp_path / "svsk", 4)
