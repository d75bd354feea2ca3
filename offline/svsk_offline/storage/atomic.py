# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear complete or not at all."""

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svsk_kernels.errors import SvskError
from svsk_offline.preflight import check_apart
from svsk_offline.storage.locks import locked
from svsk_vllm.format.contents import StoredTensor
from svsk_vllm.format.shard_headers import INDEX_NAME, ShardHeaders

if TYPE_CHECKING:  # text and JSON are written without it
    import torch

__all__ = [
    "PartialFolder",
    "write_file",
    "write_index",
    "write_json",
    "write_tensors",
    "write_text",
]


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, force it to disk, then rename it.

    A device or a pipe (``/dev/null``, ``/dev/stdout``) is written to: a file renamed over it would
    take its place for everybody.

    Raises:
        OSError: it cannot be written; so does whatever ``write`` raises, and no file is left.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / path.name)
            with (Path(folder) / path.name).open("rb") as whole, path.open("wb") as device:
                shutil.copyfileobj(whole, device)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would leave 0600
        write(temporary)
        temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # half a file only takes the room that may be lacking
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
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

    write_file(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, two spaces of indentation."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; tensors that share memory are copied."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        ready[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    header = {"format": "pt", **(metadata or {})}

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata=header)
            _sort_metadata(temporary, header)
        except SafetensorError as error:
            # It says "I/O error: No space left on device (os error 28)" where Python would raise an
            # OSError.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

    write_file(path, write)


def write_index(folder: Path, shards: Iterable[str]) -> None:
    """Write the index of a folder's shards, atomically, by what their headers say."""
    reader = ShardHeaders(folder, shards=shards)
    weight_map = {name: reader.shard_of(name) for name in reader.names}
    size = sum(StoredTensor(*reader.stored(name)).num_bits for name in reader.names) // 8
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)


def _sort_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Sort the metadata of a safetensors file, whose order safetensors leaves to chance."""
    start = b'{"__metadata__":'
    ordered = json.dumps(
        dict(sorted(metadata.items())), separators=(",", ":"), ensure_ascii=False
    ).encode()
    with path.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = handle.read(size)
        end = len(start) + len(ordered)
        if not header.startswith(start) or json.loads(header[len(start) : end]) != dict(metadata):
            raise AssertionError(
                f"{path}: safetensors writes its header in another way than expected"
            )
        handle.seek(8 + len(start))
        handle.write(ordered)


class PartialFolder:
    """An output folder that is built under another name and renamed when it is whole.

    It is built in a folder inside a working folder beside ``out``. What a run needs to continue is
    in the working folder itself, so that nothing has to be taken out of the result, before or after
    it is renamed.

    Attributes:
        path: the working folder.
        result: the folder in it that becomes ``out``.

    Args:
        out: the final folder.
        source: folder that is read, if any; ``out`` must not contain it or lie in it.
        overwrite: replace ``out`` if it exists.
        suffix: what the working folder's name ends with.

    Raises:
        SvskError: ``out`` exists and ``overwrite`` is False, or it overlaps the source.
    """

    def __init__(
        self,
        out: Path,
        source: Path | None = None,
        *,
        overwrite: bool = False,
        suffix: str = "partial",
    ) -> None:
        out = out.resolve()
        if source:
            check_apart(out, source)
        self.out, self._overwrite = out, overwrite
        self.path = out.with_name(f"{out.name}.{suffix}")
        self.result = self.path / "checkpoint"
        self._check()

    def _check(self) -> None:
        """Whether ``out`` may be written."""
        if self.out.exists() and not self._overwrite:
            raise SvskError(
                f"{self.out} exists. Choose another folder, or pass --overwrite to replace it."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs away from ``out``, whatever they make of it.

        Raises:
            SvskError: another run is under way there, or has put a folder there meanwhile.
            OSError: the folder that shall hold ``out`` cannot be written.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.out.with_name(f".{self.out.name}.lock"), self.out):
            self._check()
            yield

    def create(self) -> Path:
        """Make the working folder and the one in it, where they are missing; the latter."""
        self.result.mkdir(parents=True, exist_ok=True)
        return self.result

    def discard(self) -> None:
        """Remove the working folder.

        Raises:
            OSError: something in it cannot be removed.
        """
        if self.path.exists():
            shutil.rmtree(self.path)

    def commit(self) -> Path:
        """Put the result in the place of ``out``, remove the working folder, and return ``out``."""
        _sync_folder(self.result)
        old = self.out.with_name(f".{self.out.name}.old")
        if old.exists():  # of a run that was killed here
            shutil.rmtree(old)
        if self.out.exists():
            self.out.rename(old)
        self.result.rename(self.out)
        _sync_folder(self.out.parent)
        for leftover in (old, self.path):
            shutil.rmtree(leftover, ignore_errors=True)
        return self.out
