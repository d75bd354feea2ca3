# SPDX-License-Identifier: Apache-2.0
"""Shards of two runs are never taken for one checkpoint."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import svsk_vllm.hf  # noqa: F401 - registers the loader
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe
from svsk_vllm.architecture.folder_check import require_sound
from svsk_vllm.format import SvskFormatError, validate_checkpoint
from svsk_vllm.format.fingerprint import FINGERPRINT_KEY, shard_fingerprint
from tests.offline.folders import folder_bytes
from tests.support.format_builders import edit_json

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _files_of_one_part_each() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svsk_offline.storage.checkpoint_writer.SHARD_BYTES", 1)
        yield


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, tiny_recipe: Recipe
) -> tuple[Path, Path]:
    """Two checkpoints of one model that differ in the seed of the calibration samples."""
    folder = tmp_path_factory.mktemp("runs")
    other = tiny_recipe.override({"calibration": {"seed": 1}})
    return quantize(tiny_qwen2, folder / "a", tiny_recipe).folder, quantize(
        tiny_qwen2, folder / "b", other
    ).folder


def refused(folder: Path, message: str) -> None:
    """By the validator, by what both loaders ask, and by the one of transformers."""
    (problem,) = [problem for problem in validate_checkpoint(folder) if "run" in problem]
    assert message in problem
    with pytest.raises(SvskFormatError, match=message):
        require_sound(folder, None)
    with pytest.raises(SvskFormatError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_shard_of_another_run_is_refused(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    mixed = shutil.copytree(runs[0], tmp_path / "mixed")
    shutil.copyfile(runs[1] / SHARD, mixed / SHARD)
    refused(mixed, "shards of 2 runs")


def test_all_shards_of_another_run_than_the_config_are_refused(
    tmp_path: Path, runs: tuple[Path, Path]
) -> None:
    mixed = shutil.copytree(runs[0], tmp_path / "mixed")
    for shard in runs[1].glob("*.safetensors"):
        shutil.copyfile(shard, mixed / shard.name)
    refused(mixed, "config.json of run")
    edit_json(mixed / "config.json", lambda config: config["quantization_config"].pop("producer"))
    assert validate_checkpoint(mixed) == []


def test_shards_with_and_without_are_refused_and_all_without_are_not(
    tmp_path: Path, runs: tuple[Path, Path]
) -> None:
    mixed = shutil.copytree(runs[0], tmp_path / "mixed")
    save_file(load_file(mixed / SHARD), mixed / SHARD, {"format": "pt"})
    refused(mixed, "a run without fingerprint has model-00002")
    for shard in mixed.glob("*.safetensors"):
        save_file(load_file(shard), shard, {"format": "pt"})
    refused(mixed, "shards of a run without fingerprint")
    # As an earlier version wrote it.
    edit_json(
        mixed / "config.json",
        lambda config: config["quantization_config"]["producer"].pop(FINGERPRINT_KEY),
    )
    assert validate_checkpoint(mixed) == []
    AutoModelForCausalLM.from_pretrained(mixed)


def test_models_that_differ_in_one_value_differ(
    tmp_path: Path, tiny_qwen2: Path, tiny_recipe: Recipe, runs: tuple[Path, Path]
) -> None:
    model = shutil.copytree(tiny_qwen2, tmp_path / "elsewhere")
    assert (
        folder_bytes(quantize(model, tmp_path / "same", tiny_recipe).folder).keys()
        == folder_bytes(runs[0]).keys()
    )
    assert shard_fingerprint(tmp_path / "same" / SHARD) == shard_fingerprint(runs[0] / SHARD)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][64] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    quantize(model, tmp_path / "other", tiny_recipe)
    assert shard_fingerprint(tmp_path / "other" / SHARD) != shard_fingerprint(runs[0] / SHARD)


def test_a_foreign_shard_in_an_unfinished_run_is_written_again(
    tmp_path: Path, tiny_qwen2: Path, tiny_recipe: Recipe, runs: tuple[Path, Path]
) -> None:
    def stop(index: int, total: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_qwen2, tmp_path / "out", tiny_recipe, progress=Progress(block=stop))
    shutil.copyfile(runs[1] / SHARD, tmp_path / "out.partial" / "parts" / "00001.safetensors")
    layers: list[Any] = []
    quantize(tiny_qwen2, tmp_path / "out", tiny_recipe, progress=Progress(layer=layers.append))
    assert len(layers) == 14
    assert folder_bytes(tmp_path / "out") == folder_bytes(runs[0])
