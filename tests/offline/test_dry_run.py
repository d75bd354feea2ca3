# SPDX-License-Identifier: Apache-2.0
"""``svsk quantize --dry-run`` against the run itself."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from svsk_eval.cli import app
from svsk_offline.dry_run import dry_run
from svsk_offline.pipeline import quantize
from svsk_offline.precision import block_dtype
from svsk_offline.recipe import Recipe, load_recipe
from svsk_offline.storage.inspection import inspect_checkpoint


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_sizes_are_those_of_the_run(
    model: str, tiny_recipe: Recipe, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dense: Path = request.getfixturevalue(model)
    recipe = tiny_recipe.override(
        {"ignore": ("re:.*down_proj",), "tables": {"head": "int8", "embedding": "int8"}}
    )
    estimate = dry_run(dense, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())
    quantize(dense, tmp_path / "out", recipe)
    found = inspect_checkpoint(tmp_path / "out")
    assert estimate.bits_per_weight == pytest.approx(found["bits_per_weight"])
    assert estimate.bits_per_weight_of_all == pytest.approx(found["bits_per_weight_of_all"])
    bits = sum(sum(row["bits"].values()) for row in found["groups"])
    assert estimate.output == bits // 8 + found["dense_bytes"]
    assert sum(row["count"] for row in estimate.quantised) == found["linears"]
    assert estimate.left_by_ignore == tuple(
        f"model.layers.{index}.mlp.down_proj.weight" for index in (0, 1)
    )


def test_what_is_held_at_a_time(tiny_llama: Path, tmp_path: Path) -> None:
    """A budget's share, and the memory of its statistics, worked out by hand for a tiny model."""
    small = {"calibration": {"samples": 24, "seq_len": 32}, "alternating": {"aim": 0.0}}
    recipe = load_recipe("best").override(small)
    estimate = dry_run(tiny_llama, tmp_path / "out", recipe, device="cpu")
    assert estimate.budget == estimate.bits_per_weight == 4.45
    hidden, inter, kv = 128, 384, 64
    item = block_dtype(torch.device("cpu")).itemsize
    inputs = 6 * hidden**2 + inter**2
    largest = hidden * inter
    # of q, k and v first tokens are kept apart
    assert estimate.memory["statistics of a block"] == 4 * (
        inputs + 3 * hidden**2 + 5 * inter**2 + 3 * largest
    )
    codes = 2 * hidden**2 + 2 * hidden * kv + 3 * largest
    assert estimate.memory["codes of a block"] == codes
    outputs = 3 * hidden**2 + 2 * kv**2 + 2 * inter**2
    assert estimate.memory["gradients' statistics"] == 4 * 2 * (inputs + outputs)
    assert estimate.memory["hidden states"] == 24 * 32 * hidden * item
    assert estimate.memory["inputs of all blocks"] == 2 * estimate.memory["hidden states"]
    quantising = estimate.memory["statistics of a block"]  # less than what measuring holds
    assert estimate.memory_peak == sum(estimate.memory.values()) - quantising - codes
    assert estimate.disk == {
        "hidden states": 0,
        "inputs of all blocks": 0,
        "inputs in the dense model": 0,
        "the checkpoint": estimate.output,
    }


def test_what_is_held_where_weights_aim_at_the_dense_outputs(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("fast").override(
        {"calibration": {"samples": 24, "seq_len": 32}, "alternating": {"aim": 1.0}}
    )
    memory = dry_run(tiny_llama, tmp_path / "out", recipe, device="cpu").memory
    hidden, inter, kv = 128, 384, 64
    item = block_dtype(torch.device("cpu")).itemsize
    weights = 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inter
    assert memory["statistics of a block"] == 4 * (7 * inter**2 + 3 * hidden * inter + weights)
    widths = hidden + 6 * hidden + inter  # the hidden states, and of each linear its input
    assert memory["inputs in the dense model"] == 24 * 32 * widths * item
    assert memory["gradients' statistics"] == 0


def test_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    options = ["--recipe", "fast", "--samples", 24, "--seq-len", 32, "--dry-run"]
    result = svsk("quantize", tiny_llama, tmp_path / "out", *options, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    estimate = json.loads((tmp_path / "e.json").read_text())
    assert f"bits per weight {estimate['bits_per_weight']:.4f} of the linears" in result.output
    assert "time: not estimated" in result.output
    refused = svsk("quantize", tiny_llama, tmp_path / "out", *options, "--ignore", "re:.*typo")
    assert refused.exit_code == 1
    assert "matches no linear layer" in refused.stderr
