# SPDX-License-Identifier: Apache-2.0
"""One run at a time, and a run that was killed at any point goes on to the same bytes."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import svsk_offline.storage.atomic
from svsk_kernels.errors import SvskError
from svsk_offline.export.dense import restore
from svsk_offline.pipeline import Progress, quantize
from svsk_offline.recipe import Recipe
from svsk_offline.storage.inspection import validate_against_architecture
from svsk_offline.storage.layer_report import LayerReport
from svsk_offline.storage.locks import locked
from tests.offline.folders import folder_bytes


def test_a_second_run_is_told_of_the_first(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    told: list[str] = []

    def second(report: LayerReport) -> None:
        if told:
            return
        for overwrite in (False, True):
            with pytest.raises(SvskError) as refused:
                quantize(tiny_llama, tmp_path / "out", tiny_recipe, overwrite=overwrite)
            told.append(str(refused.value))

    quantize(tiny_llama, tmp_path / "out", tiny_recipe, progress=Progress(layer=second))
    pattern = (
        rf"another run is under way there: process {os.getpid()} on {re.escape(platform.node())},"
        r" started \d{4}-"
    )
    assert len(told) == 2
    assert all(re.search(pattern, text) for text in told)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert validate_against_architecture(tmp_path / "out") == []


def test_restore_deletes_no_folder_of_something_else(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    made = quantize(tiny_llama, tmp_path / "made", tiny_recipe).folder
    own = tmp_path / "out.restoring" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("years of work")
    with pytest.raises(SvskError, match="something else than an unfinished run"):
        restore(made, tmp_path / "out")
    assert own.exists()
    own.unlink()
    assert restore(made, tmp_path / "out") == tmp_path / "out"


def test_restore_and_quantize_do_not_meet(
    tmp_path: Path, tiny_llama: Path, tiny_recipe: Recipe
) -> None:
    quantize(tiny_llama, tmp_path / "svsk", tiny_recipe)

    def meet(done: int, total: int) -> None:
        with pytest.raises(SvskError, match="another run is under way"):
            quantize(tiny_llama, tmp_path / "out", tiny_recipe)

    restore(tmp_path / "svsk", tmp_path / "out", progress=meet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "svsk"]


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from svsk_offline.storage.locks import locked\n"
        "with locked(Path(sys.argv[1]), Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    lock = tmp_path / "lock"
    assert subprocess.run([sys.executable, "-c", program, lock], check=False).returncode == -9
    assert lock.exists()
    with locked(lock, lock):
        pass
    assert not lock.exists()


def test_a_lock_that_was_removed_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the holder removes the file and a third run makes it anew.

    That one has it.
    """
    lock, opens = tmp_path / "lock", 0
    real = os.open

    def opened(path: Any, *arguments: Any) -> int:
        nonlocal opens
        descriptor = real(path, *arguments)
        if path == lock:
            opens += 1
            if opens == 1:
                lock.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    with locked(lock, lock):
        assert opens == 2
        assert lock.exists()
        with pytest.raises(SvskError), locked(lock, lock):
            pass


class Killed(BaseException):
    """Stands in for the kill."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path, tiny_recipe: Recipe) -> Path:
    """The folder of an undisturbed run."""
    return quantize(tiny_qwen2, tmp_path_factory.mktemp("whole") / "out", tiny_recipe).folder


@pytest.mark.parametrize("late", [False, True])
def test_killed_at_every_write(
    tmp_path: Path,
    tiny_qwen2: Path,
    tiny_recipe: Recipe,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
) -> None:
    """The run is killed at its first write, started again, killed at its second, and so on."""
    real, out = svsk_offline.storage.atomic.write_file, tmp_path / "out"
    left = 0

    def write(path: Path, fill: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0 and not late:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half a fi")
            raise Killed
        real(path, fill)
        if left < 0:
            raise Killed

    monkeypatch.setattr(svsk_offline.storage.atomic, "write_file", write)
    kills = 0
    for writes in range(100):
        left = writes
        try:
            quantize(tiny_qwen2, out, tiny_recipe)
            break
        except Killed:
            kills += 1
            assert not out.exists()
    assert kills >= 5
    assert folder_bytes(out) == folder_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("calls", [0, 1])
def test_killed_between_the_renames(
    tmp_path: Path,
    tiny_qwen2: Path,
    tiny_recipe: Recipe,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "README.md").write_text("of an earlier run")
    real, done = Path.rename, 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal done
        if done == calls:
            raise Killed
        done += 1
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            quantize(tiny_qwen2, out, tiny_recipe, overwrite=True)
    quantize(tiny_qwen2, out, tiny_recipe, overwrite=True)
    assert folder_bytes(out) == folder_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
