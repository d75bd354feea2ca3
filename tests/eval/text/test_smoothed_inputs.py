# SPDX-License-Identifier: Apache-2.0
"""What smoothing makes of inputs of few bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svsk_eval.text.activations import rounded_inputs
from svsk_eval.text.models import load_model
from svsk_eval.text.smoothed_inputs import app, fold_loaded, measure
from svsk_offline.calibration import load_calibration
from svsk_offline.planning.smoothing import plan_smoothing
from svsk_offline.recipe import SmoothingArgs
from svsk_offline.storage.dense_model import ModelSource
from tests.support.tiny_models import write_dense


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model one channel of whose norms' outputs is far larger than the others."""
    folder = write_dense(tmp_path_factory.mktemp("spiked") / "dense", "llama")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[5] = 300.0
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight")):
            tensor[:, 5] /= 300
        if name.endswith("up_proj.weight"):
            tensor[:, 5] /= 300
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The rate of stones in a tin is not here. " * 40)
    return path


def test_smoothing_lowers_the_cost(spiked: Path, text: Path) -> None:
    """And nothing but the rounding moves predictions."""
    options: dict[str, Any] = {"samples": 4, "chunks": 2, "seq_len": 64}
    kl = [
        measure(str(spiked), str(spiked), text, args, "python", **options).kl_mean
        for args in (None, SmoothingArgs(alpha=0.7), SmoothingArgs(above=4))
    ]
    assert kl[0] is not None
    for smoothed in kl[1:]:
        assert smoothed is not None
        assert 0 < smoothed < 0.5 * kl[0]


def test_a_folded_model_computes_the_same(spiked: Path) -> None:
    source = ModelSource(spiked)
    texts = load_calibration("python", source.tokenizer, 4, 48, 0)
    found = plan_smoothing(source, texts, SmoothingArgs(alpha=0.7), torch.device("cpu"))
    model, other = (load_model(spiked, device="cpu") for _ in range(2))
    fold_loaded(other, source, found.fold)
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, other(tokens).logits)
        with rounded_inputs(other, spiked, "int8"):
            assert not torch.equal(model(tokens).logits, other(tokens).logits)
        assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_command(spiked: Path, text: Path, tmp_path: Path) -> None:
    options = ["--chunks", "2", "--seq-len", "64", "--samples", "4", "--calibration", "python"]
    command = [str(spiked), "--text", str(text), *options, "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, [*command, "--smoothing", "0.7", "--target", "norms"])
    assert result.exit_code == 0, result.output
    assert "smoothing folded" not in result.output.splitlines()[-1]
    assert "4 outputs of norms" in result.output
    assert "KL 0." in result.output
    assert (tmp_path / "out.json").is_file()
    result = CliRunner().invoke(app, [*command, "--outliers", "4"])
    assert result.exit_code == 0, result.output
    assert "2 inputs of down_proj" in result.output
    wrong = CliRunner().invoke(app, [*command, "--smoothing", "0.7", "--target", "nothing"])
    assert wrong.exit_code == 1
    assert "Traceback" not in wrong.output
