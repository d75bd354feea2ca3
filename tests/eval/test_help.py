# SPDX-License-Identifier: Apache-2.0
"""Help of every command: ``svsk``'s, and the programs of the evaluation that ``python -m`` runs."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
if str(ROOT / "eval") not in sys.path:
    sys.path.append(str(ROOT / "eval"))  # `peers` is not part of the installed package
SOURCES = [
    *(ROOT / "offline/svsk_offline").rglob("*.py"),
    *(ROOT / "eval/svsk_eval").rglob("*.py"),
    *(ROOT / "eval/peers").glob("*.py"),
]
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])
    for path in SOURCES
    if re.search(r"^app = App\(", path.read_text(encoding="utf-8"), re.MULTILINE)
)
WIDE = {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}


def help_pages(name: str) -> list[tuple[Any, str]]:
    """The commands of a program, each with its help as it is printed."""
    module = importlib.import_module("svsk_eval.cli" if name == "svsk_offline.app" else name)
    whole = typer.main.get_command(module.app)
    pages = [(whole, CliRunner().invoke(module.app, ["--help"], env=WIDE))]
    for called, command in getattr(whole, "commands", {}).items():
        pages.append((command, CliRunner().invoke(module.app, [called, "--help"], env=WIDE)))
    assert all(result.exit_code == 0 for _, result in pages)
    return [(command, result.stdout) for command, result in pages]


def test_the_programs_are_found() -> None:
    assert {"svsk_offline.app", "svsk_eval.demo", "svsk_eval.speed.throughput"} <= {*PROGRAMS}


def test_no_program_goes_round_the_class() -> None:
    """Of what typer makes itself, help would differ."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"typer\.(Typer\(|run\()", text), path


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_options_with_a_value_show_a_type(name: str) -> None:
    seen = 0
    for command, page in help_pages(name):
        context = typer.Context(command, info_name=name)
        for option in command.get_params(context):
            if option.param_type_name != "option" or option.hidden:
                continue
            assert option.help, f"{name}: {option.opts[0]} says nothing of itself"
            (row,) = re.findall(rf"^│[ *]+{option.opts[0]}\s.*$", page, re.MULTILINE)
            cells = row.partition(option.help.split()[0])[0]
            assert bool(re.search(r"<[^>]+>", cells)) == (not option.is_flag), row
            seen += 1
    assert seen


def test_brackets_in_help_are_text() -> None:
    (page,) = [page for _, page in help_pages("svsk_eval.smollm2")]
    assert "[default: $SVSK_CACHE or .cache/svsk]" in page
