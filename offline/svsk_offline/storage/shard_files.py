# SPDX-License-Identifier: Apache-2.0
"""Safetensors files put together: one per decoder block while a run is under way, few at its end.

Bytes are copied from file to file, tensor by tensor; no tensor is in memory.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from svsk_offline.storage import atomic
from svsk_vllm.format.contents import StoredTensor
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.shard_headers import SINGLE_NAME

__all__ = ["group_files", "merge_files", "shard_names"]

_CHUNK: Final = 1 << 24
_METADATA: Final = "__metadata__"


def group_files(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours that fit into one file, by number.

    Args:
        sizes: of the files, bytes.
        most: bytes of a group; a file that is larger stays alone.
    """
    groups: list[list[int]] = []
    left = 0
    for number, size in enumerate(sizes):
        if not groups or size > left:
            groups.append([])
            left = most
        groups[-1].append(number)
        left -= size
    return groups


def shard_names(count: int) -> list[str]:
    """File names as Hugging Face has them, of so many files."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def merge_files(parts: Sequence[Path], target: Path) -> None:
    """Write one safetensors file of the tensors of several, atomically.

    The widest values come first, so that each tensor begins at a multiple of its value's size, as
    readers that map the file want it; of one size tensors are in the order of their names.

    Args:
        parts: whole files, whose tensors have different names.
        target: the file to write.

    Raises:
        SvskFormatError: a part is no safetensors file, or two have a tensor of one name.
        OSError: no room, or a file cannot be read or written.
    """
    metadata: dict[str, str] = {}
    found: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
    for part in parts:
        header, start = _header(part)
        metadata |= header.pop(_METADATA, {})
        for name, entry in header.items():
            if name in found:
                raise SvskFormatError(f"{part}: has {name}, and so has {found[name][0]}.")
            found[name] = (part, start, entry)
    order = sorted(found, key=lambda name: (-_width(found[name][2]), name))
    merged: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        entry = found[name][2]
        begin, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        merged[name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(merged, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        handles = {part: part.open("rb") for part in parts}
        try:
            with temporary.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for name in order:
                    part, start, entry = found[name]
                    first, last = entry["data_offsets"]
                    handles[part].seek(start + first)
                    _copy(handles[part], out, last - first, part)
        finally:
            for handle in handles.values():
                handle.close()

    atomic.write_file(target, write)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(size))
        except ValueError as error:
            raise SvskFormatError(f"{path}: is no safetensors file ({error}).") from error
    return header, 8 + size


def _width(entry: Mapping[str, Any]) -> int:
    return StoredTensor(entry["dtype"], (1,)).num_bits


def _copy(source: IO[bytes], out: IO[bytes], size: int, path: Path) -> None:
    while size:
        piece = source.read(min(size, _CHUNK))
        if not piece:
            raise SvskFormatError(f"{path}: ends before its last tensor. It was cut short.")
        out.write(piece)
        size -= len(piece)
