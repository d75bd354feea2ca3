# SPDX-License-Identifier: Apache-2.0
"""The benchmark of layers on a CPU runs and reports every candidate."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import svsk_kernel_tools.bench.cpu as bench
from svsk_kernels.cpu.cpu_kernel import cpu_ops_obstacle


@pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
def test_benchmark_reports_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"o": (608, 1088)})
    document = tmp_path / "bench.json"
    arguments = ["--shapes", "o", "--rows", "1,3", "--rounds", "2", "--json", str(document)]
    result = CliRunner().invoke(bench.app, arguments)
    assert result.exit_code == 0, result.output
    microseconds = json.loads(document.read_text())["microseconds"]["o"]
    assert list(microseconds) == ["1", "3"]
    for times in microseconds.values():
        assert {"linear", *bench.LAYERS} <= set(times)
        assert min(times.values()) > 0
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(bench._HEADINGS) + 1}


@pytest.mark.skipif(
    cpu_ops_obstacle() is not None, reason="the op for this processor cannot be built"
)
def test_the_path_of_a_lesser_processor(tmp_path: Path) -> None:
    document = tmp_path / "bench.json"
    arguments = ["--shapes", "80x192", "--rows", "2", "--rounds", "2", "--json", str(document)]
    arguments += ["--dtype", "float32", "--instructions", "avx2", "--threads", "1"]
    result = CliRunner().invoke(bench.app, arguments)
    assert result.exit_code == 0, result.output
    (times,) = json.loads(document.read_text())["microseconds"]["80x192"].values()
    assert set(times) == {"linear", *bench.LAYERS}


def test_ratios_of_the_table() -> None:
    times = {
        "linear": 30.0,
        "w4a16": 40.0,
        "int4_base": 10.0,
        "int4_tiles": 12.0,
        "int4_whole": 11.0,
        "quad8_tiles": 13.0,
        "int4_two_level_32": 10.4,
        "int4_two_level_16": 11.5,
        "int8_base": 6.0,
        "int8_whole": 7.5,
        "int8_two_level_32": 7.0,
    }
    times_shown = ["30", "40", "10", "12", "11", "13", "10", "12"]
    ratios = ["0.20", "0.10", "1.04", "1.15", "3.33x", "2.50x"]
    ratios += ["6", "8", "7", "5.00x", "4.00x"]
    assert bench.table_rows({"o": {1: times}}) == [["o", "1", *times_shown, *ratios]]


def test_unknown_shape_is_refused() -> None:
    result = CliRunner().invoke(bench.app, ["--shapes", "head"])
    assert result.exit_code == 2
    assert "expected one of" in result.output
