# SPDX-License-Identifier: Apache-2.0
"""``svsk eval --engine vllm``.

The served checkpoint scores as transformers scores the dense model it stands for.

The two compute in bfloat16 with other kernels: single tokens differ by some hundredths of a nat
either way, the mean over a text must not.
"""

import inspect
import json
import random
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_eval.errors import EvalError
from svsk_eval.text.engine_args import served_dtype
from svsk_eval.text.scoring import evaluate
from svsk_eval.text.served import evaluate_served, served_scores
from svsk_kernels.cpu.cpu_kernel import cpu_ops_obstacle
from svsk_kernels.cpu.processor import instructions_for
from tests.serving.conftest import serving_environment

BOUND = 0.005
"""Nats per token."""


@pytest.fixture(autouse=True)
def environment(fork_served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in serving_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Random letters: text means nothing to a model of random weights."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz .,;\n", k=4096)))
    return path


def test_tiny_model_against_its_restored_self(tiny_pair: Any, letters: Path) -> None:
    """Two engines.

    The checkpoint on the device's own kernel, and the dense model as its reference.
    """
    pair = tiny_pair("llama", torch.bfloat16)
    options = {"chunks": 5, "seq_len": 256}
    served = evaluate_served(
        pair.svsk, pair.restored, letters, **options, engine_args={"enforce_eager": True}
    )
    dense = evaluate(pair.restored, None, letters, **options, dtype="bfloat16")
    assert abs(served.nll - dense.nll) < BOUND
    assert served.per_chunk.nll == pytest.approx(dense.per_chunk.nll, abs=2 * BOUND)
    assert served.ref_nll == pytest.approx(dense.nll, abs=BOUND)
    assert served.delta_nll == pytest.approx(served.nll - served.ref_nll)
    assert served.top1 is not None
    assert 0.9 < served.top1 <= 1
    assert served.kl_mean is None
    assert served.inputs is not None
    assert dense.inputs is not None
    assert served.inputs.text_fingerprint == dense.inputs.text_fingerprint
    fast = served_dtype("auto")  # not the checkpoint's on every processor
    assert (served.inputs.dtype, served.inputs.engine) == (
        "bfloat16" if fast == "auto" else fast,
        "vllm",
    )
    assert served.inputs.engine_settings is not None
    if cpu_ops_obstacle() is None:
        assert served.inputs.engine_settings["svsk_kernels"] == [
            f"CpuKernel {instructions_for(torch.bfloat16 if fast == 'auto' else torch.float32)}"
        ]


def test_the_command_serves_with_the_kernel_that_is_asked_for(
    tiny_pair: Any, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tiny_pair("llama", torch.bfloat16)
    monkeypatch.setenv("SVSK_KERNEL", "reference")
    options = ["--text", str(letters), "--chunks", "5", "--seq-len", "256", "--dtype", "bfloat16"]
    engine = [
        "--engine",
        "vllm",
        "--engine-arg",
        "enforce_eager=true",
        "--json",
        str(tmp_path / "served.json"),
    ]
    result = CliRunner().invoke(
        app, ["eval", str(pair.svsk), *options, *engine], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "in bfloat16; SVSK kernels: ReferenceKernel" in result.output
    served = json.loads((tmp_path / "served.json").read_text())
    dense = evaluate(pair.restored, None, letters, 5, 256, dtype="bfloat16")
    assert abs(served["nll"] - dense.nll) < BOUND


def test_what_vllm_refuses_is_in_the_error(tiny_pair: Any) -> None:
    pair = tiny_pair("llama", torch.bfloat16)
    with pytest.raises(
        EvalError, match=r"(?s)svsk: its process failed \(exit code 1\).*no_such_argument"
    ):
        served_scores(
            pair.svsk, torch.ones(1, 8, dtype=torch.int64), engine_args={"no_such_argument": 1}
        )


@pytest.mark.slow
def test_smollm2(smollm2_pair: Any, tmp_path: Path) -> None:
    """A trained model on English and code, with compiled graphs, on the default kernel."""
    pair = smollm2_pair("bfloat16")
    text = tmp_path / "text.txt"
    text.write_text(inspect.getsource(textwrap) + inspect.getsource(random))
    served = evaluate_served(pair.svsk, None, text, 8, 256)
    dense = evaluate(pair.restored, None, text, 8, 256, dtype="bfloat16")
    assert dense.nll < 3, "a trained model knows this text"
    assert abs(served.nll - dense.nll) < BOUND
