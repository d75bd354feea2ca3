# SPDX-License-Identifier: Apache-2.0
"""Errors of a block's linears against the tokens they are calibrated on."""

from pathlib import Path

import pytest

from svsk_eval.errors import EvalError
from svsk_eval.tune.tokens_per_width import draw, measure
from svsk_offline.recipe import load_recipe
from tests.support.tiny_models import write_dense


def test_more_tokens_fit_others_better(tmp_path: Path) -> None:
    """Few tokens look better than many where they were fitted, and are worse elsewhere."""
    recipe = load_recipe("fast").override(
        {"calibration": {"seq_len": 32}, "sidecar": {"rank": 4, "tile_m": 0, "tile_n": 0}}
    )
    model = write_dense(tmp_path / "dense", "llama")
    points = measure(model, ("python", "python"), recipe, 1, (0.6, 8.0), 8)
    assert len(points) == 14
    few, many = points[::2], points[1::2]
    for before, after in zip(few, many, strict=True):
        assert before.name == after.name
        assert before.fitted < after.fitted
    assert sum(p.held_out for p in few) > sum(p.held_out for p in many)
    draw(points, tmp_path / "figure.svg")
    assert "tokens per input feature" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_a_block_that_is_not_there(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "dense", "llama")
    with pytest.raises(EvalError, match="--block 2: the model has blocks 0 to 1"):
        measure(model, ("python", "python"), load_recipe("fast"), 2, (0.5,), 1)
