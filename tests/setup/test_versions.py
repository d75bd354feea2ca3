# SPDX-License-Identifier: Apache-2.0
"""The parts of .ci/versions.py and .ci/overlay.py that ask no package index."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

SCRIPTS = Path(__file__).resolve().parents[2] / ".ci"


@pytest.fixture(scope="module")
def versions() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield import_module("versions")
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("versions", "overlay", "setup_env"):
            sys.modules.pop(name, None)


def add(folder: Path, name: str, version: str, *needs: str) -> None:
    """A distribution without code."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {n}" for n in needs),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_bounds_are_the_ends_of_what_is_allowed(versions: ModuleType) -> None:
    released = [Version(text) for text in ("0.9", "1.0", "1.1", "1.2rc1", "2.0")]
    assert versions.overlay.bounds("a", SpecifierSet(">=1.0,<2"), released) == (
        Version("1.0"),
        Version("1.1"),
    )
    with pytest.raises(
        versions.overlay.OverlayError, match=r"a: no released version is within >=3"
    ):
        versions.overlay.bounds("a", SpecifierSet(">=3"), released)


def test_every_package_that_is_tried_has_bounds_in_the_project(versions: ModuleType) -> None:
    project = versions.tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    found = versions.overlay.requirements(project)
    for package in versions.PACKAGES:
        operators = {specifier.operator for specifier in found[package]}
        assert operators == {">=", "<"}, package


@pytest.mark.parametrize(
    ("need", "installed", "expected"),
    [
        ("b>=2", "2.1", []),
        ("b>=2", "1.0", ["b>=2"]),
        ("c", "1.0", ["c"]),
        ("b>=2; extra == 'more'", "1.0", []),
        ("b>=2; python_version < '3'", "1.0", []),
        ("b==2.0+cpu", "2.0", []),
        ("b==2.0+cpu", "2.1", ["b==2.0+cpu"]),
    ],
)
def test_what_an_overlay_lacks(
    versions: ModuleType, tmp_path: Path, need: str, installed: str, expected: list[str]
) -> None:
    add(tmp_path, "a", "1.0", need)
    assert [str(found) for found in versions.overlay.unmet(tmp_path, {"b": installed})] == expected


def test_an_overlay_is_asked_before_the_environment(versions: ModuleType, tmp_path: Path) -> None:
    add(tmp_path, "a", "1.0", "B_b<2")
    add(tmp_path, "b.b", "1.5")
    assert versions.overlay.unmet(tmp_path, {"b-b": "3.0"}) == []


def test_an_overlay_that_python_does_not_find_is_refused(
    versions: ModuleType, tmp_path: Path
) -> None:
    add(tmp_path, "svsk_front_test", "1.5")
    versions.check_in_front(Path(sys.executable), "svsk_front_test", "1.5", tmp_path)
    with pytest.raises(
        versions.overlay.OverlayError, match=r"svsk_front_test 1\.6 is not what Python finds: 1\.5"
    ):
        versions.check_in_front(Path(sys.executable), "svsk_front_test", "1.6", tmp_path)


def test_tests_are_counted_and_see_the_folder_in_front(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    front, tests = tmp_path / "front", tmp_path / "tests"
    front.mkdir()
    tests.mkdir()
    (front / "svsk_front_test.py").write_text("value = 3\n")
    (tests / "pytest.ini").write_text("[pytest]\n")
    (tests / "test_it.py").write_text(
        "import pytest\n"
        "def test_right():\n    import svsk_front_test\n    assert svsk_front_test.value == 3\n"
        "def test_wrong():\n    raise AssertionError\n"
        "def test_skipped():\n    pytest.skip('on purpose')\n"
    )
    file, python = str(tests / "test_it.py"), Path(sys.executable)
    assert versions.run_tests(python, [file], front, tmp_path / "1.xml") == (1, 1, 1)
    assert versions.run_tests(python, [file, "-k", "right"], front, tmp_path / "2.xml") == (1, 0, 0)
    assert versions.run_tests(python, [str(tests / "absent.py")], front, tmp_path / "3.xml") == (
        0,
        1,
        0,
    ), "none ran"


def test_a_row_replaces_the_one_of_its_trial(versions: ModuleType, tmp_path: Path) -> None:
    table, (first, *_, last) = tmp_path / "versions.md", versions.trials()
    old = versions.row(first, "1.0", [], ["tests/hf"], (3, 0, 1))
    versions.write_table([versions.row(last, "-", ["b 2"], ["tests"], (7, 0, 0)), old], table)
    gone = versions.Row("abandoned", "oldest", "1", "-", "hf", 1, 0, 0, "2026-01-01")
    table.write_text(table.read_text() + gone.line() + "\n")
    new = versions.row(first, "2.0", [], ["tests/hf", "tests/plugin/test_plugin.py"], (4, 1, 0))
    versions.write_table([new], table)
    lines = table.read_text().removeprefix(versions.HEAD).splitlines()
    assert [versions.Row.parse(line).version for line in lines] == ["2.0", "-"]
    assert lines[0].startswith(
        f"| {first.what} | oldest | 2.0 | - | hf, plugin/test_plugin | 4 | 1 | 0 | 2"
    )


def test_the_slow_tests_count_as_all_other_trials_do(versions: ModuleType) -> None:
    names = [trial.name for trial in versions.trials()]
    assert names[-1] == "slow tests:pinned"
    assert (
        len(names)
        == len(set(names))
        == 2 * len(versions.PACKAGES) + len(versions.OTHER_PYTHONS) + 1
    )


def test_a_version_that_cannot_be_had_fails_the_run(
    versions: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise versions.overlay.OverlayError("pip index versions: no network")

    monkeypatch.setattr(versions.overlay, "released", refuse)
    monkeypatch.setattr(versions, "TABLE", tmp_path / "versions.md")
    monkeypatch.setattr(versions, "find_pythons", lambda _: {})
    assert versions.main(["--only", "transformers:oldest"]) == 1
    assert "transformers:oldest: pip index versions: no network" in capsys.readouterr().out
    assert versions.main(["--only", "Python:3.12"]) == 0
    assert "Python:3.12: no such Python was found" in capsys.readouterr().out


def test_a_python_that_does_not_run_is_passed_over(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions.shutil, "which", lambda _: None)
    for release, text in (("3.12.1", "exit 1"), ("3.12.7", "exit 0"), ("3.13.0", "exit 127")):
        program = tmp_path / release / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    assert versions.find_pythons([tmp_path]) == {"3.12": tmp_path / "3.12.7" / "bin" / "python"}


def test_one_allowed_version_is_tried_once(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = next(iter(versions.PACKAGES))
    oldest, newest = (versions.Trial(package, which) for which in ("oldest", "newest"))
    monkeypatch.setattr(versions.overlay, "released", lambda *_: [Version("1.0")])
    only = (Version("1.0"), Version("1.0"))
    monkeypatch.setattr(versions.overlay, "bounds", lambda *_: only)
    runs = []
    monkeypatch.setattr(versions.overlay, "build", lambda *_: runs.append(1) or [])
    monkeypatch.setattr(versions, "check_in_front", lambda *_: None)
    monkeypatch.setattr(versions, "run_tests", lambda *_: (5, 0, 1))
    first, second = versions.run_all([oldest, newest], {}, tmp_path)
    assert len(runs) == 1
    assert (first.which, second.which) == ("oldest", "newest")
    assert (first.passed, first.version) == (second.passed, second.version) == (5, "1.0")
