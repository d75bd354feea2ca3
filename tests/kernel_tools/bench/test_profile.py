# SPDX-License-Identifier: Apache-2.0
"""Reading Nsight Compute's table (``ncu --csv --page raw``), and joining it with the launches."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from svsk_kernel_tools.bench import profile
from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernel_tools.bench.profile import METRICS, Profiled, app, parse_ncu, rows_of

LAUNCHED = {"shape": "s", "n": 256, "k": 512, "m": 1, "variant": "int4-r16-8bit"}


def table(rows: list[dict[str, str]], units: dict[str, str]) -> str:
    """A page as ncu prints it: a row of names, one of units, one per launch; all cells quoted."""
    names = ["ID", "Process ID", "Kernel Name", "Grid Size", *METRICS.values()]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(names)
    writer.writerow([units.get(name, "") for name in names])
    for number, row in enumerate(rows):
        writer.writerow([str(number), "77", *(row.get(name, "n/a") for name in names[2:])])
    return text.getvalue()


DECODE = {
    "Kernel Name": "decode_kernel",
    "Grid Size": "(4, 1, 1)",
    METRICS["us"]: "5.50",
    METRICS["dram_percent"]: "81.25",
    METRICS["dram_read_bytes"]: "1.50",
    METRICS["instructions"]: "13,107",
}
UNITS = {METRICS["us"]: "us", METRICS["dram_percent"]: "%", METRICS["dram_read_bytes"]: "Mbyte"}
UNITS |= {METRICS["instructions"]: "inst"}


def test_numbers_units_and_messages() -> None:
    text = (
        '==PROF== Connected to process 77\n{"shape": "s"}\n'
        + table([DECODE], UNITS)
        + "==PROF== Disconnected\n"
    )
    (launch,) = parse_ncu(text)
    assert launch.kernel == "decode_kernel"
    assert launch.metrics == {
        "us": 5.5,
        "dram_percent": 81.25,
        "dram_read_bytes": 1.5e6,
        "instructions": 13107.0,
    }


@pytest.mark.parametrize(
    ("unit", "us"), [("ns", 0.0055), ("nsecond", 0.0055), ("usecond", 5.5), ("msecond", 5500)]
)
def test_time_comes_in_any_unit(unit: str, us: float) -> None:
    assert parse_ncu(table([DECODE], UNITS | {METRICS["us"]: unit}))[0].metrics[
        "us"
    ] == pytest.approx(us)


def test_what_ncu_cannot_say_is_an_error() -> None:
    with pytest.raises(BenchError, match=r"gpu__time_duration\.sum in 'fortnight'"):
        parse_ncu(table([DECODE], UNITS | {METRICS["us"]: "fortnight"}))
    with pytest.raises(
        BenchError, match=r"ncu printed no table\. Its output ends: .*ERR_NVGPUCTRPERM"
    ):
        parse_ncu("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")


def test_launches_meet_their_counters_in_order() -> None:
    shrink = Profiled("shrink_kernel", {"us": 2.0})
    decode = Profiled("decode_kernel", {"us": 5.5, "instructions": 16384.0})
    rows = rows_of([LAUNCHED | {"kernels": ["shrink_kernel", "decode_kernel"]}], [shrink, decode])
    assert [row["kernel"] for row in rows] == ["shrink_kernel", "decode_kernel"]
    assert rows[1]["instructions_per_weight"] == 16384 * 32 / (256 * 512)
    assert "instructions_per_weight" not in rows[0]
    with pytest.raises(
        BenchError, match=r"ncu saw the kernels \['decode_kernel'\], but \['fold_kernel'\]"
    ):
        rows_of([LAUNCHED | {"kernels": ["fold_kernel"]}], [decode])


def test_a_run_with_a_stand_in_for_ncu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script in ncu's place prints what the process and ncu would, and keeps its arguments."""
    printed = json.dumps(LAUNCHED | {"kernels": ["decode_kernel"]}) + "\n" + table([DECODE], UNITS)
    (tmp_path / "printed").write_text(printed)
    stand_in = tmp_path / "ncu"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" > "{tmp_path}/arguments"\ncat "{tmp_path}/printed"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(profile, "open_device", lambda name: name)
    monkeypatch.setattr(profile, "describe", lambda device: {"gpu": "none"})
    file = tmp_path / "out" / "profile.json"
    done = CliRunner().invoke(app, ["--shape", "qwen3-4b.o", "--tokens", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "81.2" in done.output
    written: dict[str, Any] = json.loads(file.read_text())
    assert written["launches"][0]["metrics"]["us"] == 5.5
    arguments = (tmp_path / "arguments").read_text()
    assert "--profile-from-start off" in arguments
    assert "--clock-control none" in arguments
    assert "--launch --shape=qwen3-4b.o --tokens=1" in arguments


def test_without_ncu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(profile, "open_device", lambda name: name)
    monkeypatch.setattr(profile, "describe", lambda device: {})
    done = CliRunner().invoke(app, ["--json", str(tmp_path / "p.json")])
    assert done.exit_code == 2
    assert not (tmp_path / "p.json").exists()
    done = CliRunner().invoke(app, ["--shape", "nothing"])
    assert done.exit_code == 2
