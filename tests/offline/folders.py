# SPDX-License-Identifier: Apache-2.0
"""Comparing folders."""

from pathlib import Path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by their path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }
