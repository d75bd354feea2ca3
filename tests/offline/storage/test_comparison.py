# SPDX-License-Identifier: Apache-2.0
"""``svsk diff``: what two checkpoints differ in."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svsk_eval.cli import app
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe
from svsk_offline.storage.comparison import compare_checkpoints
from svsk_offline.storage.layer_report import REPORT_NAME, stored_errors
from svsk_vllm.format import SvskFormatError


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_recipe: Recipe
) -> tuple[Path, Path]:
    """Two that differ in the rank of their sidecars."""
    folder = tmp_path_factory.mktemp("pair")
    other = tiny_recipe.override({"sidecar": {"rank": 2}})
    return (
        quantize(tiny_llama, folder / "a", tiny_recipe).folder,
        quantize(tiny_llama, folder / "b", other).folder,
    )


def test_a_copy_differs_in_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(pair[0], tmp_path / "copy")
    found = compare_checkpoints(pair[0], copy)
    assert found["config"] == found["schemes"] == found["errors"] == {}
    assert not any(names for key, names in found["tensors"].items() if key != "equal")
    tensors = load_file(copy / "model.safetensors")
    assert len(found["tensors"]["equal"]) == len(tensors)
    name = "model.layers.1.mlp.up_proj.weight_packed"
    tensors[name][3, 5] += 1
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    changed = compare_checkpoints(pair[0], copy)["tensors"]
    assert changed["values"] == [name]
    assert changed["only_first"] == ["model.norm.weight"]


def test_another_rank(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["diff", *map(str, pair), "--json", str(tmp_path / "d.json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "d.json").read_text())
    producer = "quantization_config.producer.recipe_values.sidecar.rank"
    assert found["config"][producer] == [4, 2]
    assert len(found["schemes"]) == 14
    ours, theirs = found["schemes"]["model.layers.0.mlp.up_proj"]
    assert (ours["sidecar"]["rank"], theirs["sidecar"]["rank"]) == (4, 2)
    assert ours["bits_per_weight"] > theirs["bits_per_weight"]
    first, second = found["figures"]["bits_per_weight"]
    assert first > second
    assert f"{first:.4f}" in result.output
    assert "model.layers.0.mlp.up_proj.sidecar_u" in found["tensors"]["dtype_or_shape"]
    assert len(found["errors"]) == 14
    assert all(ours < theirs for ours, theirs in found["errors"].values())
    assert "errors of outputs: 14 differ, the second's are 1." in result.output


def test_errors_are_kept_of_every_matrix(pair: tuple[Path, Path], tmp_path: Path) -> None:
    rows = stored_errors(pair[0])
    assert len(rows) == 14
    assert all(0 < row["error"] < row["base_error"] for row in rows.values())
    assert stored_errors(tmp_path) == {}
    for text, said in (
        ("{}", "has no matrices"),
        ('{"matrices": {"a": {"error": 1}}}', "'a' lacks a number of base_error"),
        ('{"matrices": {"a": 1}}', "'a' lacks a number"),
    ):
        (tmp_path / REPORT_NAME).write_text(text)
        with pytest.raises(SvskFormatError, match=said):
            stored_errors(tmp_path)
