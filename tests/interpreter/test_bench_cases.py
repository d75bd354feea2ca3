# SPDX-License-Identifier: Apache-2.0
"""The benchmark's checks by name, without timings: what a sanitizer is given."""

import json
from pathlib import Path

from typer.testing import CliRunner

from svsk_kernel_tools.bench.__main__ import app
from svsk_kernel_tools.bench.runner import FINISHED


def test_chosen_checks_alone(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ["--device", "cpu", "--case", "rank 16", "--checks-only", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == FINISHED, result.output
    written = json.loads(file.read_text())
    assert {record["group"] for record in written["records"]} == {"check/rank 16", "note"}
    assert written["records"][-1]["text"] == "this run left the timings out"
    unknown = CliRunner().invoke(app, ["--device", "cpu", "--case", "rank 17", "--json", str(file)])
    assert unknown.exit_code == 2
    assert "--case rank 17: expected one of no sidecar, bias; rank 16;" in unknown.stderr
    assert CliRunner().invoke(app, ["--checks-only", "--skip-checks"]).exit_code == 2
