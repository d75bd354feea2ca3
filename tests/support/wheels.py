# SPDX-License-Identifier: Apache-2.0
"""Wheels of the project, made from what git tracks."""

import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["build_wheel", "tracked_files"]

ROOT = Path(__file__).parents[2]


def tracked_files(to: Path) -> Path:
    """A copy of the tracked files that a wheel is made of, because a build leaves folders."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if files.returncode:
        pytest.skip("not a checkout of git")
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((ROOT / name).read_bytes())
    return to


def build_wheel(source: Path, out: Path) -> Path:
    """Build a wheel of a folder or of a source distribution."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    (wheel,) = out.glob("*.whl")
    return wheel
