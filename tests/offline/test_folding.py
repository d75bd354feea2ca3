# SPDX-License-Identifier: Apache-2.0
"""Smoothing from the command line to the checkpoint: everything sees the folded model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import svsk_offline.planning.folded_model as folding
import svsk_offline.planning.measurements as measuring
from svsk_eval.cli import app
from svsk_kernels.errors import SvskError
from svsk_offline.calibration import BlockRunner
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.planning.smoothing import Smoothing
from svsk_offline.recipe import Recipe, SmoothingArgs, load_recipe
from svsk_offline.storage.fold import Fold
from svsk_offline.storage.inspection import smoothing_lines, validate_against_architecture
from svsk_offline.storage.layer_report import LayerReport
from svsk_vllm.format import Checkpoint, ShardedReader
from tests.offline.folders import folder_bytes
from tests.support.interruptions import stop_at_a_matrix
from tests.support.tiny_models import write_dense

SMOOTH = {"smoothing": {"alpha": 0.7, "keys": True}}


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def smooth(tiny_recipe: Recipe) -> Recipe:
    return tiny_recipe.override(SMOOTH)


@pytest.fixture
def kept_fold(monkeypatch: pytest.MonkeyPatch) -> list[Smoothing]:
    """What runs fold, and how often they look for it."""
    found: list[Smoothing] = []
    look = folding.plan_smoothing

    def noted(*arguments: Any, **options: Any) -> Smoothing:
        found.append(look(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(folding, "plan_smoothing", noted)
    return found


def test_a_checkpoint_is_of_the_folded_model(
    tmp_path: Path, tiny_qwen2: Path, smooth: Recipe, kept_fold: list[Smoothing]
) -> None:
    """Every stored tensor is that of the folded model: dense ones exactly, others but rounded."""
    said: list[str] = []
    result = quantize(tiny_qwen2, tmp_path / "out", smooth, progress=Progress(message=said.append))
    assert validate_against_architecture(result.folder) == []
    (found,) = kept_fold
    checkpoint, stored = Checkpoint(result.folder), ShardedReader(tiny_qwen2)
    restored = ShardedReader(restore(result.folder, tmp_path / "dense"))
    for name in stored.names:
        dense = found.fold.scale(name, stored.read(name))
        if name in checkpoint.dense_names:
            # Keys' factors are no whole powers of two: a bias of k_proj is rounded when stored.
            assert torch.equal(checkpoint.read_dense(name), dense.bfloat16())
            continue
        error = (restored.read(name).float() - dense.float()).square().sum()
        assert error < 0.02 * dense.float().square().sum()
    # Biases and norms are among what is folded, and dense.
    assert {"model.layers.0.self_attn.k_proj.bias", "model.layers.0.input_layernorm.weight"} <= {
        name for name in checkpoint.dense_names if name in found.fold
    }
    record = checkpoint.config.producer["smoothing"]
    assert record["alpha"] == 0.7
    assert record["targets"] == ["norms", "o", "down"]
    assert record["folded"] == {"norms": 4, "o": 2, "down": 2, "keys": 2}
    assert len(record["keys"]) == 2
    shown = svsk("inspect", result.folder).output
    assert "smoothing alpha 0.7, folded into the weights: 4 outputs of norms" in shown
    assert any("4 outputs of norms" in text for text in said)
    assert any(text.startswith("smoothing of keys: largest over median") for text in said)


def test_statistics_are_of_folded_inputs(
    tmp_path: Path,
    tiny_llama: Path,
    smooth: Recipe,
    kept_fold: list[Smoothing],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the quantiser is given of an input is what the folded weight multiplies."""
    moments: dict[bool, dict[int, torch.Tensor]] = {False: {}, True: {}}
    folded = False
    collect = BlockRunner.collect

    def noted(runner: BlockRunner, index: int, block: Any, **kwargs: Any) -> Any:
        statistics = collect(runner, index, block, **kwargs)
        moments[folded][index] = statistics["mlp.down_proj"].second_moment
        return statistics

    monkeypatch.setattr(BlockRunner, "collect", noted)
    quantize(tiny_llama, tmp_path / "plain", smooth.model_copy(update={"smoothing": None}))
    folded = True
    inputs = SmoothingArgs(alpha=0.7)  # keys are folded up to rounding
    quantize(tiny_llama, tmp_path / "out", smooth.model_copy(update={"smoothing": inputs}))
    for index in range(2):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        factors = 2.0 ** kept_fold[0].fold.columns[name].float()
        # Exactly: a power of two rounds no square and no sum of them.
        assert torch.equal(moments[True][index] * factors.square(), moments[False][index])


def test_an_interrupted_run_keeps_its_factors(
    tmp_path: Path, tiny_llama: Path, smooth: Recipe, kept_fold: list[Smoothing]
) -> None:
    """It goes on to the same bytes, and does not look for factors again."""
    quantize(tiny_llama, tmp_path / "whole", smooth)

    def stop(report: LayerReport) -> None:
        if report.name.startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, tmp_path / "out", smooth, progress=Progress(layer=stop))
    redone: list[str] = []
    quantize(
        tiny_llama,
        tmp_path / "out",
        smooth,
        progress=Progress(layer=lambda report: redone.append(report.name)),
    )
    assert {name.split(".")[2] for name in redone} == {"1"}
    assert len(kept_fold) == 2
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_shards_of_other_factors_are_not_taken(
    tmp_path: Path, tiny_llama: Path, smooth: Recipe, kept_fold: list[Smoothing]
) -> None:
    """A maximum between two powers of two may be rounded the other way on another machine."""

    def stop(report: LayerReport) -> None:
        if report.name.startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, tmp_path / "out", smooth, progress=Progress(layer=stop))
    (path,) = (tmp_path / "out.partial").glob("svsk-smoothing*")
    found = Smoothing.load(path)
    name = "model.layers.0.mlp.down_proj.weight"
    up = name.replace("down", "up")
    found.fold.columns[name][0] += 1
    found.fold.rows[up][0] -= 1
    found.save(path)
    redone: list[str] = []
    quantize(
        tiny_llama,
        tmp_path / "out",
        smooth,
        progress=Progress(layer=lambda report: redone.append(report.name)),
    )
    assert {name.split(".")[2] for name in redone} == {"0", "1"}


def test_an_unfinished_run_without_smoothing_is_another(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe, smooth: Recipe
) -> None:
    stop_at_a_matrix(tiny_llama, tmp_path / "out", tiny_recipe)
    with pytest.raises(SvskError, match="unfinished run of another model, recipe"):
        quantize(tiny_llama, tmp_path / "out", smooth)


def test_measurements_are_not_shared_with_the_unfolded_model(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Fold | None] = []
    sweep = measuring.sweep_gradients

    def noted(source: Any, *arguments: Any, **options: Any) -> None:
        calls.append(source.fold)
        sweep(source, *arguments, **options)

    monkeypatch.setattr(measuring, "sweep_gradients", noted)
    plain = load_recipe("fast").override(
        {
            "calibration": {"samples": 24, "seq_len": 32},
            "sidecar": {"rank": 4, "tile_m": 0, "tile_n": 0},
            "gradients": {"row_power": 0.5},
        }
    )
    kept = tmp_path / "kept"
    recipes = (plain, plain.override(SMOOTH), plain.override({"smoothing": {"alpha": 0.5}}))
    for number, recipe in enumerate((*recipes, *recipes)):
        quantize(tiny_llama, tmp_path / str(number), recipe, measurements=kept)
    assert len(calls) == 3  # once each
    assert calls[0] is None
    assert all(fold is not None for fold in calls[1:])
    assert len(list(kept.glob("measured-*"))) == 3
    for number in range(3):  # kept or measured, the bytes are the same
        assert folder_bytes(tmp_path / str(number)) == folder_bytes(tmp_path / str(number + 3))


def test_sequential_calibration_of_a_folded_model(
    tmp_path: Path, tiny_llama: Path, smooth: Recipe
) -> None:
    sequential = smooth.override({"calibration": {"sequential": True}})
    quantize(tiny_llama, tmp_path / "out", sequential)
    model: Any = AutoModelForCausalLM.from_pretrained(
        restore(tmp_path / "out", tmp_path / "dense"), dtype=torch.float32
    )
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = torch.arange(30).view(1, 30)
    with torch.no_grad():
        ours, reference = (m(tokens).logits.log_softmax(-1) for m in (model, dense))
    assert float((reference.exp() * (reference - ours)).sum(-1).mean()) < 0.2


def test_options(tmp_path: Path, tiny_llama: Path) -> None:
    small = ["--recipe", "published", "--samples", 4, "--seq-len", 32]
    result = svsk(
        "quantize", tiny_llama, tmp_path / "out", *small, "--smoothing", 0.5, "--smooth-keys"
    )
    assert result.exit_code == 0, result.output
    recipe = Checkpoint(tmp_path / "out").config.producer["recipe_values"]
    assert recipe["smoothing"] == {"alpha": 0.5, "keys": True, "targets": ["norms", "o", "down"]}
    wrong = svsk("quantize", tiny_llama, tmp_path / "b", *small, "--smoothing", 2)
    assert wrong.exit_code == 1
    assert "smoothing.alpha" in wrong.output
    result = svsk("quantize", tiny_llama, tmp_path / "c", *small, "--smooth-outliers", 4)
    assert result.exit_code == 0, result.output
    assert "above 4.0, folded into the weights" in svsk("inspect", tmp_path / "c").output
    both = ("--smooth-outliers", 4, "--smoothing", 0.7)
    wrong = svsk("quantize", tiny_llama, tmp_path / "d", *small, *both)
    assert wrong.exit_code == 1
    assert "Leave one of them out" in wrong.output
    idle = svsk("inspect", tmp_path / "out", "--calibration", "python")
    assert idle.exit_code == 1
    assert "no effect without --keys" in idle.output


def test_keys_are_inspected(tmp_path: Path) -> None:
    """Of a dense model and of a checkpoint of it, which says the same until keys are smoothed."""
    dense = write_dense(tmp_path / "dense", "qwen2")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.bias"][3] = 200.0
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    found = json.loads(
        svsk("inspect", dense, "--keys", "--json", "-", "--calibration", "python").stdout
    )
    assert found["blocks_that_lose_channels"] == [1]
    layers = found["layers"]
    assert [layer["block"] for layer in layers] == [0, 1]
    assert layers[1]["largest"] == pytest.approx(200, rel=0.1)
    assert layers[1]["ratio"] > 16 > 4 > layers[1]["folded_ratio"]
    shown = svsk("inspect", dense, "--keys", "--calibration", "python").output
    assert "1 of 2 layers have a head with a ratio over 16" in shown
    assert re.search(r"1\D+\d{3}\.\d", shown)
    small = ["--recipe", "fast", "--rank", 0, "--samples", 12, "--seq-len", 64]
    for out, options in (("plain", []), ("smooth", ["--smooth-keys"])):
        result = svsk("quantize", dense, tmp_path / out, *small, *options)
        assert result.exit_code == 0, result.output
    plain, smooth = (
        json.loads(svsk("inspect", tmp_path / out, "--keys", "--json", "-").stdout)
        for out in ("plain", "smooth")
    )
    assert plain["blocks_that_lose_channels"] == [1]
    assert smooth["blocks_that_lose_channels"] == []
    assert smooth["layers"][1]["ratio"] < 5


def test_keys_that_are_not_understood(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "phi3")
    result = svsk("inspect", dense, "--keys")
    assert result.exit_code == 1
    assert "the keys of its layers are not understood (no linear is called k_proj)" in result.output


def test_a_record_that_somebody_edits() -> None:
    """``producer`` may hold anything."""
    for record in (None, 3, {}, {"folded": [1]}, {"folded": {"x": "y"}, "left_alone": 2}):
        assert all(isinstance(line, str) for line in smoothing_lines(record))
