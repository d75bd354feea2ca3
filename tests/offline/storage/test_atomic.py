# SPDX-License-Identifier: Apache-2.0
"""Files that appear complete or not at all, and what is no file."""

import os
import stat
import threading
from pathlib import Path

import pytest

from svsk_kernels.errors import SvskError
from svsk_offline.storage.atomic import PartialFolder, write_json


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """So do devices: as root a file would be renamed over /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_json(pipe, {"bits": 4.5})
    reader.join(timeout=20)
    assert read == ['{\n  "bits": 4.5\n}\n']
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    before = path.stat().st_ino
    write_json(path, 1)
    assert path.read_text() == "1\n"
    assert path.stat().st_ino != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_a_folder_that_appears_in_its_place_is_kept(tmp_path: Path) -> None:
    """Whoever made it did so after the run had looked, and before it was done."""
    out = tmp_path / "out"
    partial = PartialFolder(out)
    out.mkdir()
    (out / "one").write_text("precious")
    with pytest.raises(SvskError, match=r"out exists\. Choose another folder, or pass --overwrite"):
        PartialFolder(out)
    assert not partial.path.exists()
    assert (out / "one").read_text() == "precious"
