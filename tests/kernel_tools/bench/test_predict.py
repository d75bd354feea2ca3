# SPDX-License-Identifier: Apache-2.0
"""The command that predicts times, and the page that shows what it says."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svsk_kernel_tools.bench.predict import TOKENS, app, markdown, predict, scale_rows
from svsk_kernel_tools.bench.shapes import SHAPES
from svsk_kernels.gpu.predicted_time import GPUS

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks" / "gpu-predictions.md"


def test_the_page_shows_what_the_command_says() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    for line in markdown(predict(GPUS, SHAPES, TOKENS), scale_rows(GPUS, SHAPES)):
        assert line in page, "python -m svsk_kernel_tools.bench.predict --markdown FILE"
    for line in markdown(predict(["H100"], SHAPES, TOKENS, "fast"), []):
        assert not line.startswith("| qwen") or line in page


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    arguments = ["--gpu", "H100", "--shape", "qwen3-4b.o", "--tokens", "1,512"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(out), "--markdown", str(page)])
    assert result.exit_code == 0, result.output
    assert "not measured" in result.output
    document = json.loads(out.read_text())
    assert document["measured"] is False
    assert [row["m"] for row in document["times"]] == [1, 512]
    for row in document["times"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["dense"])
    assert page.read_text().startswith("**H100:**")


def test_finer_groups_take_longer() -> None:
    rows = scale_rows(["H100"], SHAPES)
    for codebook in ("int4", "quad8"):
        for levels in (1, 2):
            more = [
                row["more"]
                for row in rows
                if (row["codebook"], row["levels"]) == (codebook, levels)
            ]
            assert more[0] == 0
            assert 0 <= more[1] < more[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "V100"], "--gpu V100: expected one of A100, L40S"),
        (["--shape", "x"], "--shape x: expected one of qwen3-4b.qkv"),
        (["--layer", "x"], "--layer x: expected one of base, fast"),
        (["--tokens", "0,a"], "--tokens 0,a: expected numbers from 1 on"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
