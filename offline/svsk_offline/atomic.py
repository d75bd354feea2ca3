# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear complete or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from svsk_offline.errors import SvskError

__all__ = ["PartialFolder", "write_json", "write_tensors", "write_text"]


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, force it to disk, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    _replace(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, two spaces of indentation."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Tensors are made contiguous and copied where two share memory."""
    ready: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        found = tensor.detach().cpu().contiguous()
        ready[name] = found.clone() if found.data_ptr() in seen else found
        seen.add(found.data_ptr())
    header = {"format": "pt", **(metadata or {})}
    _replace(path, lambda temporary: save_file(ready, temporary, metadata=header))


class PartialFolder:
    """An output folder that is built under another name and renamed when it is whole.

    Args:
        out: the final folder.
        source: folder that is read, if any; ``out`` must not contain it or lie in it.
        overwrite: replace ``out`` if it exists.
        suffix: what the working folder's name ends with.

    Raises:
        SvskError: ``out`` exists and ``overwrite`` is False, or it overlaps the source.
    """

    def __init__(
        self, out: Path, source: Path | None = None, *, overwrite: bool = False, suffix: str = "partial"
    ) -> None:
        out, source = out.resolve(), source.resolve() if source else None
        if source and (out == source or out in source.parents or source in out.parents):
            raise SvskError(f"{out}: overlaps the model it is made from, {source}. Choose another folder.")
        self.out = out
        self.path = out.with_name(f"{out.name}.{suffix}")
        if out.exists() and not overwrite:
            raise SvskError(f"{out} exists. Choose another folder, or pass --overwrite to replace it.")

    def create(self) -> Path:
        """Make the working folder (an existing one is kept) and return it."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def discard(self) -> None:
        """Remove the working folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> Path:
        """Put the working folder in the place of ``out`` and return ``out``."""
        _sync_folder(self.path)
        old = self.out.with_name(f".{self.out.name}.old")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.path.rename(self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)
        return self.out
