# SPDX-License-Identifier: Apache-2.0
"""What a shell offers for ``svsk``, asked as shells ask: through typer's environment variables."""

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import svsk_eval.commands
import svsk_offline.commands
from svsk_eval import choices
from svsk_eval.cli import app
from svsk_eval.text.activations import ACTIVATIONS
from svsk_offline.calibration_entries import BUILT_IN
from svsk_offline.choices import DEVICES
from svsk_offline.completion import list_of
from svsk_offline.export.formats import FORMATS
from svsk_offline.recipe import recipe_names
from svsk_vllm.kv_cache import KEY_KINDS

ROOT = Path(__file__).parents[2]
# Shells that are named, as where typer cannot tell which one runs.
NAMED = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
SHELLS = ("bash", "zsh", "fish")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# As the script that pip writes; what was imported is told on standard error.
PROGRAM = """
import sys
sys.argv[0] = "svsk"
from svsk_eval.cli import app
try:
    app()
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer may be wrapped."""
    monkeypatch.setenv("COLUMNS", "30")


def asked(shell: str, line: str) -> dict[str, str]:
    """The environment in which a shell calls ``svsk`` when a line is typed, up to its last word."""
    if shell == "bash":
        words = line.split(" ")
        return {
            "_SVSK_COMPLETE": "complete_bash",
            "COMP_WORDS": "\n".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
    return {
        "_SVSK_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


def svsk(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env=environment, prog_name="svsk")


def offered(shell: str, line: str) -> list[str]:
    """What a shell offers for a line, without what it says of each."""
    result = svsk(**asked(shell, line))
    assert result.stderr == ""
    if shell == "zsh":
        return re.findall(r'^(?:_arguments .*\(\()?"(.*?)"', result.stdout, re.MULTILINE)
    return [row.partition("\t")[0] for row in result.stdout.splitlines() if row]


@pytest.mark.parametrize("shell", SHELLS)
def test_subcommands(shell: str) -> None:
    assert offered(shell, "svsk ") == list(COMMANDS)
    assert offered(shell, "svsk re") == [name for name in COMMANDS if name.startswith("re")]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options(shell: str, name: str) -> None:
    options = {
        option
        for one in COMMANDS[name].params
        for option in (*one.opts, *one.secondary_opts)
        if option.startswith("--")
    }
    assert {*offered(shell, f"svsk {name} --")} == options | {"--help"}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("svsk quantize m out --recipe ", recipe_names()),
        ("svsk tune m out.yaml --recipe f", ["fast"]),
        ("svsk recipes ", recipe_names()),
        ("svsk quantize m out --codebook ", ["int4", "quad8"]),
        ("svsk quantize m out --group-size ", ["16", "32", "64"]),
        ("svsk quantize m out --head m", ["mixed-int8"]),
        ("svsk quantize --budget-includes ", ["head"]),
        ("svsk quantize m --calibration ", list(BUILT_IN)),
        ("svsk inspect m --device ", list(DEVICES)),
        ("svsk eval m --kv ", list(choices.KV_KINDS)),
        ("svsk eval m --activations ", list(choices.ACTIVATIONS)),
        ("svsk bench m --tasks svsk_smoke,svsk_r", ["svsk_smoke,svsk_reasoning"]),
        ("svsk bench m --text-engine hf,", ["hf,vllm", "hf,hf"]),
        ("svsk sweep m out --peer gptq,aw", ["gptq,awq"]),
        ("svsk sweep m out --also ", recipe_names()),
        ("svsk export m out --to ", list(FORMATS)),
    ],
)
def test_values(shell: str, line: str, values: list[str]) -> None:
    assert offered(shell, line) == values


def test_where_there_is_no_name_shells_offer_files() -> None:
    for line in ("svsk quantize ", "svsk quantize m out --recipe ./", "svsk eval m --text "):
        assert svsk(**asked("bash", line)).stdout.strip() == ""
        assert svsk(**asked("zsh", line)).stdout.strip() == "_files"
        fish = asked("fish", line) | {"_TYPER_COMPLETE_FISH_ACTION": "is-args"}
        assert svsk(**fish).exit_code == 1


def checked_choices() -> list[tuple[str, str, tuple[object, ...]]]:
    """Command, option and choices of each call of ``choose`` in the commands."""
    found = []
    packages = (svsk_offline.commands, svsk_eval.commands)
    names = [
        f"{package.__name__}.{module.name}"
        for package in packages
        for module in pkgutil.iter_modules(package.__path__)
    ]
    for name in names:
        module = importlib.import_module(name)
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for function in filter(lambda node: isinstance(node, ast.FunctionDef), tree.body):
            assert isinstance(function, ast.FunctionDef)
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "choose":
                    option, _, values = call.args
                    assert isinstance(option, ast.Constant)
                    called = {"evaluate": "eval", "benchmark": "bench"}.get(function.name)
                    chosen = eval(ast.unparse(values), vars(module))
                    found.append((called or function.name, str(option.value), chosen))
    return found


@pytest.mark.parametrize(("name", "option", "values"), checked_choices())
def test_what_a_command_takes_is_what_shells_offer(
    name: str, option: str, values: tuple[object, ...]
) -> None:
    assert offered("bash", f"svsk {name} {option} ") == [str(value) for value in values]


def test_names_that_are_listed_once_more_are_those_of_their_tables() -> None:
    sys.path.append(str(ROOT / "eval"))
    try:
        peers = importlib.import_module("peers.listed").PEERS
    finally:
        sys.path.remove(str(ROOT / "eval"))
    assert {*choices.PEERS} == {*peers}
    assert {*choices.ACTIVATIONS} == {*ACTIVATIONS}
    assert {*choices.KV_KINDS} == {*KEY_KINDS}
    for name in choices.task_names():
        text = (ROOT / "eval/tasks" / f"{name}.yaml").read_text(encoding="utf-8")
        assert re.search(rf"^(task|group): {name}$", text, re.MULTILINE)


def test_lists_keep_what_was_typed() -> None:
    complete = list_of(("a", "ab", "b"))
    assert complete("b,a") == ["b,a", "b,ab"]
    assert complete("") == ["a", "ab", "b"]
    assert complete("c") == []


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("line", ["svsk ", "svsk quantize --recipe ", "svsk eval m --kv "])
def test_nothing_heavy_is_imported(shell: str, line: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **asked(shell, line)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0
    assert run.stdout.strip()
    heavy = {"torch", "transformers", "vllm", "lm_eval", "numpy", "compressed_tensors"}
    assert not (heavy | {"pydantic", "yaml"}) & {*run.stderr.split()}


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_shown_and_installed(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAMED, "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = svsk("--show-completion", shell)
    assert shown.exit_code == 0
    assert f"_SVSK_COMPLETE=complete_{shell}" in shown.stdout
    installed = svsk("--install-completion", shell)
    assert installed.exit_code == 0
    (path,) = [path for path in tmp_path.rglob("*svsk*") if path.is_file()]
    assert str(path) in installed.stdout
    assert path.read_text().strip() == shown.stdout.strip()


def test_where_nothing_can_be_written_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").touch()
    monkeypatch.setenv(NAMED, "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = svsk("--install-completion", "bash")
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*home.*: .*\n", result.stderr)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_itself_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed script in a shell, with the command on its PATH."""
    monkeypatch.setenv(NAMED, "1")
    (tmp_path / "completion.sh").write_text(svsk("--show-completion", "bash").stdout)
    (tmp_path / "svsk").write_text(f"#!{sys.executable}\n{PROGRAM}")
    (tmp_path / "svsk").chmod(0o755)
    asks = (
        f"PATH={tmp_path}:$PATH; source {tmp_path}/completion.sh; complete -p svsk;"
        " COMP_WORDS=(svsk quantize m out --recipe ''); COMP_CWORD=5;"
        ' _svsk_completion svsk; echo "${COMPREPLY[@]}"'
    )
    run = subprocess.run(["bash", "--norc", "-c", asks], text=True, capture_output=True, check=True)
    assert run.stdout.splitlines() == [
        "complete -o default -F _svsk_completion svsk",
        " ".join(recipe_names()),
    ]
