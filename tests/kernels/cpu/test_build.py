# SPDX-License-Identifier: Apache-2.0
"""Where the CPU's library is looked for and built, and which one is taken.

Nothing is compiled or loaded here.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import svsk_kernels.cpu.build as cpu_build

Obstacle = Callable[[], str | None]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Libraries that were built, in order. One loads if it holds "good", what is built does."""
    made: list[Path] = []

    def build(path: Path, compiler: str, library: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("good")
        made.append(path)

    def loads(path: Path, reasons: list[str], library: object) -> bool:
        if path.read_text() != "good":
            reasons.append(f"loading {path} failed: invalid ELF header")
        return path.read_text() == "good"

    monkeypatch.setattr(cpu_build, "_build", build)
    monkeypatch.setattr(cpu_build, "_loads", loads)
    monkeypatch.setattr(cpu_build, "_version", lambda compiler: f"{compiler} 12.2")
    monkeypatch.setattr(cpu_build.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return made


def obstacle() -> str | None:
    """As in a new process."""
    cpu_build._key.cache_clear()
    return cpu_build._load_obstacle.__wrapped__(cpu_build._LINEAR)


@pytest.fixture(autouse=True)
def forget() -> None:
    cpu_build._key.cache_clear()


def test_one_build_serves_later_processes(built: list[Path], tmp_path: Path) -> None:
    assert (obstacle(), obstacle()) == (None, None)
    assert [path.parent for path in built] == [tmp_path / "cache" / "svsk"]


@pytest.mark.parametrize("change", ["compiler", "processor", "torch", "C library"])
def test_a_library_of_another_machine_is_not_taken(
    built: list[Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Machines that share a home folder may differ in processors, compilers and C libraries."""
    obstacle()
    if change == "compiler":
        monkeypatch.setattr(cpu_build, "_version", lambda compiler: f"{compiler} 13.1")
    elif change == "processor":
        read = Path.read_text
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda self, **how: "flags : avx2" if self.name == "cpuinfo" else read(self, **how),
        )
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(cpu_build.platform, "libc_ver", lambda: ("glibc", "2.99"))
    assert obstacle() is None
    assert len({path.name for path in built}) == 2


def test_without_a_compiler_what_is_there_is_taken(
    built: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_build, "_version", lambda compiler: None)
    assert obstacle() == "there is no C++ compiler 'g++'; install g++ or set CXX"
    monkeypatch.setattr(cpu_build, "_version", lambda compiler: "g++ 12.2")
    obstacle()
    monkeypatch.setattr(cpu_build, "_version", lambda compiler: None)
    assert obstacle() is None
    assert len(built) == 1


def test_a_damaged_library_is_built_anew(built: list[Path]) -> None:
    obstacle()
    built[0].write_text("damaged")
    assert obstacle() is None
    assert built[1:] == built[:1]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_folder_of_the_user(
    built: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    assert (obstacle(), obstacle()) == (None, None)
    own = built[0].parent
    assert (len(built), own.parent, own.stat().st_mode & 0o777) == (1, tmp_path / "tmp", 0o700)


def test_a_folder_that_others_can_write_is_not_trusted(
    built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    obstacle()
    built[0].parent.chmod(0o777)
    found = obstacle()
    assert found is not None
    assert f"{built[0].parent} can be written by others" in found
    assert found.endswith("XDG_CACHE_HOME names another folder to build in")
    assert len(built) == 1


def test_what_the_compiler_says_is_in_the_obstacle(
    built: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, compiler: str, library: object) -> None:
        raise subprocess.CalledProcessError(1, [compiler], stderr="cpu.cpp:1: unknown type name")

    monkeypatch.setattr(cpu_build, "_build", fail)
    found = obstacle()
    assert found is not None
    assert "cpu.cpp:1: unknown type name" in found


def test_a_home_that_nobody_knows_is_no_traceback(
    built: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    assert obstacle() is None
    assert len(built) == 1


def test_a_library_that_is_cut_short_is_not_loaded(tmp_path: Path) -> None:
    """Loading it would end the process with SIGBUS."""
    sections = (1000, 64, 4)  # where their table begins, size and number of its entries
    header = b"\x7fELF".ljust(40, b"\0") + sections[0].to_bytes(8, "little") + bytes(10)
    header += sections[1].to_bytes(2, "little") + sections[2].to_bytes(2, "little")
    whole = header.ljust(1256, b"\0")
    (tmp_path / "whole.so").write_bytes(whole)
    cpu_build._check_whole(tmp_path / "whole.so")
    for content in (whole[:-1], whole[:80], whole[:20], b"", b"text" * 400):
        (tmp_path / "cut.so").write_bytes(content)
        reasons: list[str] = []
        assert not cpu_build._loads(tmp_path / "cut.so", reasons, cpu_build._LINEAR)
        assert "no whole ELF file; delete it" in reasons[0]
