# SPDX-License-Identifier: Apache-2.0
"""The ``svsk`` command as a whole: help, output, what it imports, how a run goes on."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from svsk_eval.cli import app
from svsk_eval.speed.random_model import SHAPES
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.printable import printable
from svsk_offline.recipe import Recipe, parse_recipe, recipe_names
from svsk_offline.terminal import Steps, Terminal, duration, steps
from svsk_offline.unfinished import differences
from svsk_vllm.format import Checkpoint
from svsk_vllm.format.problems import problem_text
from tests.support.format_builders import edit_json
from tests.support.interruptions import stop_at_a_matrix
from tests.support.light_commands import run_without_heavy_imports
from tests.support.sparse_checkpoints import write_sparse_svsk
from tests.support.tiny_models import write_random_svsk

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def svsk(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return write_random_svsk(tiny_llama, tmp_path_factory.mktemp("random") / "svsk")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_two_examples_that_the_command_takes(name: str) -> None:
    command = COMMANDS[name]
    examples = re.findall(r"`(svsk [^`]+)`", command.epilog)
    assert len(examples) >= 2
    for example in examples:
        program, called, *arguments = shlex.split(example)
        assert (program, called) == ("svsk", name)
        if ">" in arguments:  # the shell's
            arguments = arguments[: arguments.index(">")]
        command.make_context(name, arguments)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_takes_the_common_options(name: str) -> None:
    options = {option for one in COMMANDS[name].params for option in one.opts}
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantise"], "Did you mean 'quantize'?"),
        (["inspect", "x", "--jsno", "y"], "--json"),
        (["quantize", "x", "y", "--recipee", "fast"], "--recipe"),
    ],
)
def test_wrong_names_suggest_the_right_one(arguments: list[str], said: str) -> None:
    result = svsk(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_what_needs_no_torch_does_not_import_it(checkpoint: Path, tmp_path: Path) -> None:
    scores = {"model": "m", "reference": None, "text_fingerprint": "f", "seq_len": 8}
    for name, nll in (("a.json", [3.0, 3.1]), ("b.json", [3.1, 3.3])):
        content = {**scores, "per_chunk": {"nll": nll}, "engine": "hf", "chunks": 2}
        (tmp_path / name).write_text(json.dumps(content))
    lines = [
        "recipes",
        "recipes best",
        f"inspect {checkpoint} --json inspected.json",
        "compare a.json b.json --json compared.json",
    ]
    run_without_heavy_imports(lines, tmp_path, 0)
    assert json.loads((tmp_path / "inspected.json").read_text())["linears"] == 14
    assert json.loads((tmp_path / "compared.json").read_text())["comparisons"]


def test_what_parses_nothing_does_not_import_pydantic(tmp_path: Path) -> None:
    """typer checks values with it, and its import takes a third of a small command's time."""
    run_without_heavy_imports(
        ["--help", "recipes --help", "recipes", "recipes -q"], tmp_path, 0, "pydantic"
    )


@pytest.mark.parametrize("experts", [0, 8])
def test_inspecting_a_large_checkpoint_reads_headers_only(tmp_path: Path, experts: int) -> None:
    """252 linears, or 1008 with eight experts, of 24 schemes; no data is there to be read."""
    shape = SHAPES["qwen3-8b"] | ({"moe_intermediate_size": 768} if experts else {})
    folder = write_sparse_svsk(tmp_path / "svsk", shape, experts=experts)
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 10 * 2**20
    run_without_heavy_imports([f"inspect {folder} --json inspected.json"], tmp_path, 0)
    inspected = json.loads((tmp_path / "inspected.json").read_text())
    linears = 36 * (4 + 3 * (experts or 1))
    assert inspected["linears"] == linears == sum(row["count"] for row in inspected["groups"])
    specs = Checkpoint(folder).linears.values()
    bits = sum(spec.stored_bits for spec in specs) / sum(spec.num_weights for spec in specs)
    assert inspected["bits_per_weight"] == pytest.approx(bits, rel=1e-12)


def test_recipes_are_printed_to_be_edited() -> None:
    for name in recipe_names():
        printed = svsk("recipes", name)
        assert parse_recipe(yaml.safe_load(printed.stdout), name).name == name
    listed = svsk("recipes", "--json", "-")
    shipped = json.loads(listed.stdout)
    assert sorted(shipped) == recipe_names()
    for values in shipped.values():  # what the table shows
        assert {"weights", "sidecar", "description"} <= set(values)
        assert {"tile_m", "tile_n"} <= set(values["sidecar"])
    wrong = svsk("recipes", "publish")
    assert wrong.exit_code == 1
    assert "Did you mean published?" in wrong.stderr


def test_json_on_standard_output_is_alone_there(checkpoint: Path, tmp_path: Path) -> None:
    """One meaning everywhere: the rest goes to standard error, and the next command is as ever."""
    inspected = svsk("inspect", checkpoint, "--json", "-")
    assert json.loads(inspected.stdout)["linears"] == 14
    assert "quantised linears" in inspected.stderr
    validated = svsk("validate", checkpoint, "--json", "-")
    assert json.loads(validated.stdout)["problems"] == []
    restored = svsk("restore", checkpoint, tmp_path / "dense", "--json", "-", "-q")
    assert json.loads(restored.stdout)["written"] == [str(tmp_path / "dense")]
    assert "in this format" not in restored.stderr
    again = svsk("restore", checkpoint, tmp_path / "again")
    assert "in this format" in again.stdout
    assert again.stderr == ""


def test_nothing_of_a_checkpoint_is_obeyed_by_a_terminal(checkpoint: Path, tmp_path: Path) -> None:
    escape = "\x1b]0;owned\x07\x9b31m[bold]"
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for path in checkpoint.iterdir():
        (hostile / path.name).write_bytes(path.read_bytes())
    producer = {"recipe": escape, "svsk": escape, "calibration": {"source": escape}}
    edit_json(
        hostile / "config.json",
        lambda config: config["quantization_config"].update(producer=producer),
    )
    for arguments in (["inspect", hostile], ["inspect", hostile, "--json", "-"]):
        result = svsk(*arguments)
        assert result.exit_code == 0
        shown = result.stdout + result.stderr
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert "[bold]" in shown
    terminal = Terminal()
    with terminal.capture() as captured:
        terminal.print(f"{escape}\n\tend", markup=False)
    text = captured.get()
    assert re.fullmatch(r"\W]0;owned\W+31m\[bold]\n +end\n", text)
    assert printable(text) == text


def test_progress_in_a_log_is_lines_now_and_then() -> None:
    now = 0.0
    lines: list[str] = []

    def show(what: str, done: int, total: int | None, left: float | None, line: str | None) -> None:
        if line is not None:
            lines.append(line)

    bar = Steps(show, lambda: now, every=15)
    for done in range(31):
        bar.update("blocks", done, 30)
        now += 4
    assert lines[0] == "blocks 4/30, 16 s, about 2 min left"
    assert len(lines) == 8
    assert lines[-1] == f"blocks 30/30, {duration(120)}"
    bar.update("blocks", 0, 30)  # a new pass: its time begins anew
    now += 20
    bar.update("blocks", 1, 30)
    assert lines[-1] == "blocks 1/30, 20 s, about 10 min left"


def test_blocks_that_were_done_before_do_not_make_the_others_seem_fast() -> None:
    now = 0.0
    estimates: list[float | None] = []
    bar = Steps(lambda what, done, total, left, line: estimates.append(left), lambda: now)
    for done in range(1, 21):
        bar.update("blocks", done, 30, skipped=True)
        bar.update("blocks", done, 30)
        now += 1
    assert estimates == [None] * 40
    for done in range(21, 31):
        now += 60 - (done == 21)  # the last of those before took one second more
        bar.update("blocks", done, 30)
    assert estimates[40:] == [*(60.0 * left for left in range(9, 0, -1)), None]


def test_a_pass_that_begins_with_a_step_done_is_timed_from_there() -> None:
    now = 0.0
    estimates: list[float | None] = []
    bar = Steps(lambda what, done, total, left, line: estimates.append(left), lambda: now)
    for done in (1, 2, 1, 2, 3):
        bar.update("blocks", done, 4)
        now += 10
    assert estimates == [None, 20.0, None, 20.0, 10.0]


def test_a_bar_says_what_is_left() -> None:
    shown = io.StringIO()
    with steps(Console(file=shown, force_terminal=True, width=100), "opening") as bar:
        bar.update("blocks", 5, 8, skipped=True)
        bar.update("blocks", 6, 8)
    line = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.getvalue()).splitlines()[-1]
    assert re.search(r"blocks .* 6/8 0:00:0\d about \d s left", line)


def test_a_resumed_run_says_which_blocks_it_skips(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    told: list[tuple[str, int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, tmp_path / "out", tiny_recipe, progress=Progress(block=stop))
    progress = Progress(
        block=lambda *counts: told.append(("done", *counts)),
        skipped=lambda *counts: told.append(("skipped", *counts)),
    )
    quantize(tiny_llama, tmp_path / "out", tiny_recipe, progress=progress)
    assert told == [("skipped", 1, 2), ("done", 1, 2), ("done", 2, 2)]


def test_a_run_of_other_values_says_which(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    stop_at_a_matrix(tiny_llama, tmp_path / "out", tiny_recipe)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny_recipe.written()))
    same = ["quantize", tiny_llama, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml"]
    changed = svsk(*same, "--samples", 3, "--group-size", 32)
    assert changed.exit_code == 1
    assert "weights.group_size: 64 there, 32 here" in changed.stderr
    assert "calibration.samples: 4 there, 3 here" in changed.stderr
    assert "hash" not in changed.stderr
    text = svsk(*same, "--calibration", "python")
    assert text.exit_code == 1
    assert "calibration.source: default there, python here" in text.stderr
    done = svsk(*same, "-q")
    assert done.exit_code == 0
    assert "output error" not in done.output
    assert "bits per weight" in done.output


def test_differences_that_follow_from_others_are_left_out() -> None:
    there = {"model": "a", "config": {"producer": {"recipe_hash": "x", "recipe_values": {"m": 1}}}}
    here = {"model": "a", "config": {"producer": {"recipe_hash": "y", "recipe_values": {"m": 2}}}}
    assert differences(there, here) == ["m: 1 there, 2 here"]
    other = {**there, "model": "b"}
    assert differences(there, other) == [
        "the model's config.json or the names of its tensors differ"
    ]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"type": "extra_forbidden", "input": 1}, "unknown key (got 1)"),
        ({"type": "missing", "input": {}}, "is missing"),
        (
            {"type": "literal_error", "input": "x", "ctx": {"expected": "'a' or 'b'"}},
            "expected a or b, got 'x'",
        ),
        (
            {"type": "value_error", "input": 1, "ctx": {"error": ValueError("expected 2, got 1")}},
            "expected 2, got 1",
        ),
        ({"type": "other", "input": 1, "msg": "Something else"}, "something else"),
    ],
)
def test_problems_are_in_our_words(item: dict[str, Any], said: str) -> None:
    assert problem_text(item) == said
