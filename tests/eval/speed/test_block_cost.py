# SPDX-License-Identifier: Apache-2.0
"""The cost of a block: a small stand-in for the large shapes goes through the same path."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svsk_eval.speed import block_cost
from svsk_eval.speed.block_cost import app
from svsk_eval.speed.random_model import SHAPES

RECIPE = """
name: small
sidecar: {rank: 4, num_bits: 4}
method: alternating
alternating: {rounds: 1}
calibration: {samples: 4, seq_len: 32}
"""


def test_reports_every_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 8,
        "num_hidden_layers": 36,
    }
    monkeypatch.setitem(SHAPES, "qwen3-4b", SHAPES["qwen3-4b"] | small)
    monkeypatch.setattr(block_cost, "_VOCABULARY", 256)
    (tmp_path / "small.yaml").write_text(RECIPE)
    report = tmp_path / "cost.json"
    arguments = [
        "qwen3-4b",
        "--recipe",
        str(tmp_path / "small.yaml"),
        "--layers",
        "2",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", str(report)])
    assert done.exit_code == 0, done.output
    cost = json.loads(report.read_text())
    assert len(cost["seconds_by_matrix"]) == 14
    assert len(cost["seconds_per_block"]) == 2
    assert cost["tokens"] == 128
    assert 4.25 < cost["bits_per_weight"] < 6
    assert cost["peak_memory_gib"] > 0
