# SPDX-License-Identifier: Apache-2.0
"""Opening files of a folder that somebody else made.

Regular files only, JSON of bounded size, safetensors by name.

A FIFO or a device in place of a file would hang a reader, a large or deeply nested JSON file would
fill its memory.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias

from safetensors import SafetensorError, safe_open

from svsk_vllm.format.errors import SvskFormatError

__all__ = [
    "MAX_INDEX_BYTES",
    "Framework",
    "copy_regular",
    "open_regular",
    "read_json",
    "safe_handle",
]

Framework: TypeAlias = Literal["pt", "numpy"]

MAX_JSON_BYTES: Final = 16 * 2**20
"""Of a config.json; one that names each of 50,000 linears in its groups has 4 MB."""
MAX_INDEX_BYTES: Final = 64 * 2**20
"""Of an index; five tensors of each of 50,000 linears, about 100 bytes an entry, are 25 MB."""
_MAX_VALUES: Final = 1_500_000
"""Values in a JSON file: a small one takes 2 bytes there and 100 in memory."""
_MAX_DEPTH: Final = 50
"""Objects within objects. Configurations have 5 levels; what copies and compares them recurses."""


def require_regular(path: Path) -> None:
    """Refuse anything but a regular file, or a link to one, before a library opens it.

    Raises:
        SvskFormatError: there is no such file, it is of another kind, or it cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise SvskFormatError(
            f"{path}: cannot be opened, no such file. Is {path.parent} a model folder?"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a surrogate pair in the name
        raise SvskFormatError(
            f"{str(path)!r}: cannot be opened ({error}). Is its name right, or where it links to?"
        ) from error
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(
            stat.S_IFMT(mode), "device"
        )
        raise SvskFormatError(
            f"{path}: is a {kind}, expected a regular file. Copy or download the folder again."
        )


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read bytes, never waiting for a writer.

    Raises:
        SvskFormatError: it is not a regular file, or cannot be opened.
    """
    require_regular(path)
    try:
        # O_NONBLOCK for a FIFO that took the file's place after the look.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SvskFormatError(
            f"{path}: cannot be opened ({error.strerror}). May this user read it?"
        ) from error
    with os.fdopen(descriptor, "rb") as handle:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SvskFormatError(
                f"{path}: changed while it was opened. Copy or download the folder again."
            )
        yield handle


def copy_regular(source: Path, to: Path) -> None:
    """Copy the content of a regular file.

    Raises:
        SvskFormatError: ``source`` is not a regular file, or cannot be opened.
    """
    with open_regular(source) as reading, to.open("wb") as writing:
        shutil.copyfileobj(reading, writing)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Where a key appears twice in an object the last one counts, as for every reader in Python.

    Args:
        path: the file.
        max_bytes: a larger file is refused.

    Raises:
        SvskFormatError: the file is missing, is no regular file, is too large or too deeply nested,
            is not JSON, or does not hold an object.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > max_bytes:
            raise SvskFormatError(
                f"{path}: {size:,} bytes, expected at most {max_bytes:,}. This is no such file."
            )
        try:
            raw = handle.read(size)
        except OSError as error:
            raise SvskFormatError(
                f"{path}: cannot be read ({error.strerror}). Is the disk in order?"
            ) from error
    if sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise SvskFormatError(f"{path}: more than {_MAX_VALUES:,} values. This is no such file.")
    try:
        value = json.loads(raw.decode("utf-8"))
        depth = _depth(value)
    except RecursionError as error:
        raise SvskFormatError(
            f"{path}: nested too deeply. Copy or write the file again."
        ) from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise SvskFormatError(
            f"{path}: not valid JSON ({error}). Copy or write the file again."
        ) from error
    if not isinstance(value, dict):
        raise SvskFormatError(f"{path}: holds a {type(value).__name__}, expected a JSON object.")
    if depth > _MAX_DEPTH:
        raise SvskFormatError(f"{path}: {depth} levels of nesting, expected at most {_MAX_DEPTH}.")
    return value


def _depth(value: Any) -> int:
    """Levels of objects and lists, counted level by level: recursion would meet its own limit."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def safe_handle(path: Path, framework: Framework = "pt") -> Any:
    """A ``safe_open`` handle that stays open.

    Args:
        path: the file.
        framework: of the tensors that are read; ``numpy`` imports no torch.

    Raises:
        SvskFormatError: it is not a regular file, or not a whole safetensors file.
    """
    require_regular(path)
    try:
        return safe_open(path, framework=framework, device="cpu")
    except (OSError, SafetensorError) as error:
        raise SvskFormatError(
            f"{path}: cannot be opened ({error}). Copy or download the file again."
        ) from error
