# SPDX-License-Identifier: Apache-2.0
"""Models, folders and requests that a quantisation refuses."""

import shutil
from pathlib import Path

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.pipeline import quantize
from svsk_offline.recipe import Recipe, load_recipe
from tests.offline.folders import folder_bytes
from tests.support.format_builders import edit_json, edit_tensors


def test_everything_ignored(tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe) -> None:
    with pytest.raises(SvskError, match="nothing to quantise"):
        quantize(tiny_llama, tmp_path / "out", tiny_recipe.override({"ignore": ("re:.*",)}))


def test_output_must_not_overlap_the_model(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    for out in (model, model / "inside", tmp_path):
        with pytest.raises(SvskError, match="overlaps the model"):
            quantize(model, out, tiny_recipe, overwrite=True)
    assert folder_bytes(model) == folder_bytes(tiny_llama)


def test_tensors_the_model_class_does_not_know(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.router.weight"] = torch.zeros(2, 2)

    edit_tensors(model, change)
    with pytest.raises(SvskError, match=r"has no tensor model\.layers\.0\.mlp\.router\.weight"):
        quantize(model, tmp_path / "out", tiny_recipe)


@pytest.mark.parametrize("rank", [0, 4])
def test_damaged_weights_are_named(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe, rank: int
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan

    edit_tensors(model, change)
    with pytest.raises(
        SvskError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds values that are not finite"
    ):
        quantize(model, tmp_path / "out", tiny_recipe.override({"sidecar": {"rank": rank}}))


@pytest.mark.parametrize("name", ["fast", "published"])
def test_weights_too_large_for_the_dtype_are_refused(
    tmp_path: Path, tiny_llama: Path, name: str
) -> None:
    """Their groups' scales overflow, and would be stored as zeros."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6

    edit_tensors(model, change)
    recipe = load_recipe(name).override({"calibration": {"samples": 32, "seq_len": 32}})
    with pytest.raises(SvskError, match=r"1\.mlp\.up_proj\.weight: .*not finite in torch\.float16"):
        quantize(model, tmp_path / "out", recipe, dtype="float16")


def test_dense_values_too_large_for_the_dtype_are_refused(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = 1e6

    edit_tensors(model, change)
    with pytest.raises(
        SvskError,
        match=r"model\.norm\.weight: has values that torch\.float16 cannot hold\. Use --dt",
    ):
        quantize(model, tmp_path / "out", tiny_recipe, dtype="float16")


def test_quantized_model_is_refused(tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe) -> None:
    quantize(tiny_llama, tmp_path / "out", tiny_recipe)
    with pytest.raises(SvskError, match="quantised already"):
        quantize(tmp_path / "out", tmp_path / "again", tiny_recipe)


def test_missing_and_misshapen_tensors_of_the_model(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    edit_json(broken / "config.json", lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(SvskError, match=r"no tensor model\.layers\.2\."):
        quantize(broken, tmp_path / "out", tiny_recipe)
    edit_json(
        broken / "config.json",
        lambda config: config.update(num_hidden_layers=2, intermediate_size=256),
    )
    with pytest.raises(
        SvskError, match=r"proj\.weight has shape \[.*\], expected \[.*\] by config.json"
    ):
        quantize(broken, tmp_path / "out2", tiny_recipe)


def test_unknown_device_and_dtype(tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe) -> None:
    with pytest.raises(
        SvskError, match=r"--device nonsense: not usable here \(.*\)\. Leave --device out"
    ):
        quantize(tiny_llama, tmp_path / "out", tiny_recipe, device="nonsense")
    with pytest.raises(SvskError, match="--dtype int8: expected auto, bfloat16 or float16"):
        quantize(tiny_llama, tmp_path / "out", tiny_recipe, dtype="int8")
    with pytest.raises(SvskError, match="no such folder"):
        quantize(tmp_path / "nowhere", tmp_path / "out", tiny_recipe)
