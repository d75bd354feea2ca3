# SPDX-License-Identifier: Apache-2.0
"""Sources of calibration text: files, data sets, and built-in texts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from svsk_kernels.errors import SvskError, one_line
from svsk_offline.calibration.built_in import built_in_documents
from svsk_offline.calibration.files import open_text
from svsk_offline.calibration.rows import RowReader
from svsk_offline.calibration_entries import BUILT_IN, CalibrationEntry, calibration_path

__all__ = ["Source", "check_chat", "check_sources"]


class Source:
    """Where calibration text comes from.

    Args:
        name: a built-in text, a file, or a data set as ``name``, ``name:split`` or
            ``name:config:split``.
        tokenizer: the model's, for its chat template.
        chat_template: render question and answer as messages.
        seed: of the order of a built-in text.

    Attributes:
        file: the file, if it is one.
        rows: what makes text of rows.

    Raises:
        SvskError: there is no such source.
    """

    def __init__(self, name: str, tokenizer: Any, chat_template: bool, seed: int = 0) -> None:
        self.name, self.seed = name, seed
        path = calibration_path(name)
        self.file = None if path is None else open_text(path)
        self.rows = RowReader(tokenizer, chat_template and name not in BUILT_IN)

    @property
    def label(self) -> str:
        """What a checkpoint calls it: of a file its name without its folder."""
        return self.file.path.name if self.file else self.name

    @property
    def has_rows(self) -> bool:
        """Whether its documents stand each for itself, and are no pieces of one text."""
        return self.file.kind != "text" if self.file else self.name != "python"

    @property
    def ordered(self) -> bool:
        """Whether the seed decides the order of its documents already."""
        return self.name in BUILT_IN and self.name != "python"

    @property
    def size(self) -> int | None:
        """Bytes of a file whose parts can be read by their place; None for all other sources."""
        file = self.file
        return (
            file.size if file and file.kind in ("text", "lines") and not file.compressed else None
        )

    def documents(self) -> Iterator[str]:
        """All text, from its beginning: documents, or pieces of one."""
        if self.file is None:
            if self.name in BUILT_IN:
                yield from built_in_documents(self.name, self.rows, self.seed)
            else:
                yield from self._data_set(_dataset_rows(self.name), self.name)
        elif self.file.kind == "parquet":
            yield from self._data_set(_parquet_rows(self.file.path), str(self.file.path))
        else:
            yield from self.after(None)

    def after(self, start: int | None) -> Iterator[str]:
        """Pieces or rows of a file from the first line that begins after byte ``start``."""
        assert self.file is not None, "only files have places"
        if self.file.kind == "text":
            yield from self.file.text(start)
            return
        for where, row in self.file.rows(start):
            yield self.rows.text(row, where)

    def _data_set(self, rows: Iterator[Mapping[str, Any]], name: str) -> Iterator[str]:
        for number, row in enumerate(rows, 1):
            yield self.rows.text(row, f"{name}, row {number}")


def check_sources(entries: Sequence[CalibrationEntry], chat_template: bool = False) -> None:
    """Look at all sources before any work. Reads no more than the first bytes of files.

    Raises:
        SvskError: a file cannot be used, or a chat template is asked for where no source can have a
            row for it.
    """
    without: list[str] = []
    for entry in entries:
        path = calibration_path(entry.name)
        file = None if path is None else open_text(path)
        if entry.name in BUILT_IN:
            without.append(f"{entry.name} has {_HOLDS.get(entry.name, _RENDERED)}")
        elif file is not None and file.kind == "text":
            without.append(f"{entry.name} has plain text")
    if chat_template and len(without) == len(entries):
        raise _no_chat(without)


def check_chat(sources: Sequence[Source]) -> None:
    """Refuse a chat template that no row of any source had a use for.

    Raises:
        SvskError: no row was rendered.
    """
    if not any(source.rows.rendered and source.name not in BUILT_IN for source in sources):
        raise _no_chat(
            [
                f"{source.name} has no row with messages, or with question and answer or the like"
                for source in sources
            ]
        )


_RENDERED: Final = "conversations that are always rendered"
_HOLDS: Final = {"python": "documentation and code", "prose": "prose", "code": "code"}


def _no_chat(without: Sequence[str]) -> SvskError:
    return SvskError(
        f"--chat-template has no effect: calibration text {', '.join(without)}. Leave it out, or"
        " give rows with question and answer, prompt and completion, or instruction and output."
    )


def _dataset_rows(source: str) -> Iterator[Mapping[str, Any]]:
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    missing = "not a file, and the package `datasets` is not installed"
    wrong = "neither a file nor a dataset that can be loaded"
    return _stream(f"Calibration {source}", missing, wrong, name, config, split=split)


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    missing = "parquet needs the package `datasets`. Install it"
    wrong = "cannot be read as parquet"
    where = f"Calibration text {path}"
    return _stream(where, missing, wrong, "parquet", data_files=str(path), split="train")


def _stream(
    where: str, missing: str, wrong: str, *args: Any, **kwargs: Any
) -> Iterator[Mapping[str, Any]]:
    """Rows of ``datasets.load_dataset``; ``missing`` is said without the package."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SvskError(f"{where}: {missing}.") from error
    try:
        yield from load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:  # the package raises many kinds: the data cannot be had
        raise SvskError(f"{where}: {wrong} ({one_line(error)}).") from error
