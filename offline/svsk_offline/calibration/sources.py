# SPDX-License-Identifier: Apache-2.0
"""Sources of calibration text: files, data sets, and the standard library of Python."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from svsk_kernels.errors import SvskError, one_line
from svsk_offline.calibration.files import TextFile, open_text
from svsk_offline.calibration.rows import RowReader
from svsk_offline.preflight import calibration_path

__all__ = ["DEFAULT_SOURCE", "Source", "check_source"]

DEFAULT_SOURCE: Final = "python"
"""Name of the text that needs no download: Python's standard library, documentation and code."""

_STANDARD_MODULES: Final = tuple(
    """
    argparse ast asyncio.base_events collections csv dataclasses datetime decimal difflib
    email.message fractions heapq http.client inspect json.decoder logging pathlib pickle random
    shutil statistics subprocess tarfile textwrap threading typing unittest.mock urllib.parse
    zipfile
    """.split()  # noqa: SIM905 - a literal would take a line for each
)


class Source:
    """Where calibration text comes from.

    Args:
        name: ``python``, a file, or a data set as ``name``, ``name:split`` or
            ``name:config:split``.
        tokenizer: the model's, for its chat template.
        chat_template: render question and answer as messages.

    Attributes:
        file: the file, if it is one.
        rows: what makes text of rows.

    Raises:
        SvskError: there is no such source, or it cannot have a row for the chat template.
    """

    def __init__(self, name: str, tokenizer: Any, chat_template: bool) -> None:
        self.name = name
        self.file = check_source(name, chat_template)
        self.rows = RowReader(tokenizer, chat_template)

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
            if self.name == DEFAULT_SOURCE:
                yield from _standard_library()
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

    def check_chat(self) -> None:
        """Refuse a chat template that no row had a use for.

        Raises:
            SvskError: no row was rendered.
        """
        if self.rows.chat_template and not self.rows.rendered:
            raise _no_chat(
                self.name, "no row with messages, or with question and answer or the like"
            )

    def _data_set(self, rows: Iterator[Mapping[str, Any]], name: str) -> Iterator[str]:
        for number, row in enumerate(rows, 1):
            yield self.rows.text(row, f"{name}, row {number}")


def check_source(name: str, chat_template: bool = False) -> TextFile | None:
    """The file that a source is, None for a data set or the standard library.

    Reads no more than its first bytes.

    Raises:
        SvskError: there is no such file, it cannot be used, or it is plain text and a chat template
            is asked for.
    """
    if name == DEFAULT_SOURCE and chat_template:
        raise _no_chat(name, "documentation and code")
    path = calibration_path(name)
    if path is None:
        return None
    file = open_text(path)
    if chat_template and file.kind == "text":
        raise _no_chat(name, "plain text")
    return file


def _no_chat(name: str, holds: str) -> SvskError:
    return SvskError(
        f"--chat-template has no effect: calibration text {name} has {holds}. Leave it out, or give"
        " rows with question and answer, prompt and completion, or instruction and output."
    )


def _standard_library() -> Iterator[str]:
    """Prose about Python, and code with docstrings, in turn: every part of the stream has both."""
    from pydoc_data.topics import topics

    prose = [topics[key] for key in sorted(topics)]
    sources = []
    for name in _STANDARD_MODULES:
        module = importlib.util.find_spec(name)
        if module and module.origin and module.origin.endswith(".py"):
            sources.append(Path(module.origin).read_text(encoding="utf-8"))
    step = -(-len(prose) // max(1, len(sources)))
    for index, code in enumerate(sources):
        yield "\n\n".join(prose[index * step : (index + 1) * step])
        yield code


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
