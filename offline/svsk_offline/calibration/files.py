# SPDX-License-Identifier: Apache-2.0
"""Files of calibration text: what they hold, told by their content, and reading it in pieces."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, Literal, cast

from svsk_kernels.errors import SvskError

__all__ = ["TextFile", "open_text"]

Kind = Literal["text", "lines", "values", "parquet"]
"""Plain text; a JSON object per line; a JSON list, or objects that span lines; parquet."""

_JSON_SUFFIXES: Final = (".json", ".jsonl", ".ndjson")
_PARQUET: Final = b"PAR1"
_GZIP: Final = b"\x1f\x8b"
_BLOCK: Final = 1 << 18
"""Bytes read at a time."""

_SNIFFED: Final = 1 << 20
"""Bytes looked at to tell what a file holds."""

_SPACE: Final = re.compile(r"\s*")

_LONGEST_ROW: Final = 1 << 28
"""Characters of a JSON value: a file that forgets to close a string is not read to its end."""


_CALIBRATION: Final = "Calibration text"


@dataclass(frozen=True)
class TextFile:
    """A file of calibration text.

    Attributes:
        path: the file.
        kind: what it holds.
        encoding: ``utf-8``, ``utf-16-le`` or ``utf-16-be``; of parquet none.
        start: bytes of the byte order mark.
        compressed: by gzip.
        size: bytes, as they are stored.
        what: what it is read for, in errors.
    """

    path: Path
    kind: Kind
    encoding: str
    start: int
    compressed: bool
    size: int
    what: str = _CALIBRATION

    def text(self, start: int | None = None) -> Iterator[str]:
        """The characters in blocks, every line end made one character, from byte ``start`` on.

        A ``start`` within the file is moved to the next line or, where that is far, the next word.

        Raises:
            SvskError: a byte that is not of the encoding, or zero.
        """
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        for number, block in enumerate(self._decoded(start)):
            text = str(newlines.decode(block))
            yield (
                _after_break(text)
                if number == 0 and start is not None and start > self.start
                else text
            )

    def lines(self, start: int | None = None) -> Iterator[tuple[str, str]]:
        """Lines that are not blank and their places, the first of which begins after ``start``."""
        skip = start is not None and start > self.start
        rest, number = "", 0
        for block in self._decoded(start):
            *whole, rest = (rest + block).split("\n")
            for line in whole:
                if skip:
                    skip = False
                    continue
                number += 1
                if line.strip():
                    yield self._place(number, start), line
            self._check_length(rest, number + 1)
        if rest.strip() and not skip:
            yield self._place(number + 1, start), rest

    def rows(self, start: int | None = None) -> Iterator[tuple[str, Any]]:
        """Where they are, and the JSON values of ``lines`` or ``values``.

        ``start`` is for the former.

        Raises:
            SvskError: something that is not JSON.
        """
        if self.kind == "values":
            yield from _Values(self).all()
            return
        for where, line in self.lines(start):
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise SvskError(
                    f"{where}: not JSON ({error}). Expected a JSON object on each line."
                ) from error
            yield where, value

    def _place(self, number: int, start: int | None) -> str:
        return f"{self.path}, line {number}" + (f" after byte {start}" if start is not None else "")

    def _check_length(self, row: str, line: int) -> None:
        if len(row) > _LONGEST_ROW:
            raise SvskError(
                f"{self.path}, line {line}: a row of more than {_LONGEST_ROW >> 20} MiB. Is a quote"
                " missing? Give a plain text file, or shorter rows."
            )

    def _open(self) -> IO[bytes]:
        return (
            cast(IO[bytes], gzip.open(self.path, "rb")) if self.compressed else self.path.open("rb")
        )

    def _decoded(self, start: int | None) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        with self._open() as raw:
            place = max(self.start, start or 0)
            if self.encoding != "utf-8":
                place -= (place - self.start) % 2
            raw.seek(place)
            if place > self.start:
                place += self._to_character(raw)
            data = b"-"
            while data:
                try:
                    data = raw.read(_BLOCK)
                except (OSError, EOFError, zlib.error) as error:
                    raise SvskError(
                        f"{self.path}: cannot be read after byte {place} ({error})."
                    ) from error
                begin = place - len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise self._undecodable(
                        begin + error.start, error.object[error.start], error.reason
                    ) from error
                if "\0" in text:
                    before = text[: text.index("\0")].encode(self.encoding)
                    raise self._undecodable(begin + len(before), 0, "no text has it")
                place += len(data)
                yield text

    def _to_character(self, raw: IO[bytes]) -> int:
        """Move on to where a character begins; how many bytes that was."""
        begin = raw.tell()
        head = raw.read(4)
        if self.encoding == "utf-8":
            moved = next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)
        else:
            high = head[1 if self.encoding == "utf-16-le" else 0] if len(head) > 1 else 0
            moved = 2 if 0xDC <= high < 0xE0 else 0
        raw.seek(begin + moved)
        return moved

    def _undecodable(self, place: int, byte: int, reason: str) -> SvskError:
        name = "UTF-8" if self.encoding == "utf-8" else "UTF-16"
        within = " of what it unpacks to" if self.compressed else ""
        return SvskError(
            f"{self.what} {self.path}: not {name}: byte {place}{within} is 0x{byte:02x}"
            f" ({reason}). Expected UTF-8, or UTF-16 with a byte order mark. Convert it, as in:"
            " iconv -f LATIN1 -t UTF-8."
        )


def open_text(path: Path, what: str = _CALIBRATION) -> TextFile:
    """Look at a file's first bytes.

    Args:
        path: the file.
        what: what it is read for, in errors.

    Raises:
        SvskError: there is no such file, it is not a regular one, it is empty, or not what its name
            says.
    """
    if path.is_dir():
        raise SvskError(f"{what} {path}: is a folder, expected a file.")
    if not path.exists():
        raise SvskError(f"{what} {path}: no such file in {path.absolute().parent}.")
    if not path.is_file():
        raise SvskError(f"{what} {path}: not a regular file.")
    size = path.stat().st_size
    with path.open("rb") as raw:
        head = raw.read(4)
    compressed = head[:2] == _GZIP
    name = path.name.lower().removesuffix(".gz") if compressed else path.name.lower()
    if head == _PARQUET or name.endswith(".parquet"):
        _check_parquet(what, path, head, size)
        return TextFile(path, "parquet", "", 0, False, size, what)
    if compressed:
        try:
            with gzip.open(path, "rb") as raw:
                head = raw.read(4)
        except (OSError, EOFError, zlib.error) as error:
            raise SvskError(
                f"{what} {path}: begins like gzip, but cannot be unpacked ({error})."
            ) from error
    if not head:
        raise SvskError(f"{what} {path}: is empty.")
    encoding, start = _encoding(what, path, head)
    file = TextFile(path, "text", encoding, start, compressed, size, what)
    return replace(file, kind=_kind(file, name))


def _encoding(what: str, path: Path, head: bytes) -> tuple[str, int]:
    if head in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        raise SvskError(
            f"{what} {path}: is UTF-32, expected UTF-8, or UTF-16 with a byte order mark."
        )
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8", 3
    for bom, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if head.startswith(bom):
            return name, 2
    return "utf-8", 0


def _check_parquet(what: str, path: Path, head: bytes, size: int) -> None:
    with path.open("rb") as raw:
        raw.seek(max(0, size - 4))
        tail = raw.read(4)
    for place, magic in (("begins", head), ("ends", tail)):
        if magic != _PARQUET:
            raise SvskError(
                f"{what} {path}: {place} with {magic!r}, a parquet file with"
                f" {_PARQUET!r}. Is it cut short, or of another kind?"
            )


def _kind(file: TextFile, name: str) -> Kind:
    """What a file holds: JSON by its suffix, or by its first value; else text."""
    head = ""
    for block in file.text():
        head += block
        if len(head) >= _SNIFFED:
            break
    body = head.lstrip()
    named = name.endswith(_JSON_SUFFIXES)
    if body[:1] == "[":
        return "values" if named or _begins_with_object(body[1:].lstrip()) else "text"
    if not named and not _begins_with_object(body):
        return "text"
    line, end, _ = body.partition("\n")
    # What is not JSON at all is told by its line, too.
    return "lines" if end and (_is_object(line) or body[:1] != "{") else "values"


def _begins_with_object(text: str) -> bool:
    if text[:1] != "{":
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        # A first object that goes on after what was looked at, as far as that goes.
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 10
        return len(text) >= _SNIFFED // 2 and cut
    except RecursionError:
        return False
    return True


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


class _Values:
    """JSON values one after the other, or the items of one list, of which only one is in memory."""

    def __init__(self, file: TextFile) -> None:
        self.file = file
        self._blocks = file.text()
        self._text, self._place, self._line = "", 0, 1
        self._decoder = json.JSONDecoder()

    def all(self) -> Iterator[tuple[str, Any]]:
        """Where they are, and the values."""
        listed = self._next() == "["
        if listed:
            self._move(1)
        number = 0
        while (character := self._next()) or listed:
            number += 1
            if listed and character == "]":
                self._move(1)
                if self._next():
                    raise self._error("text after the end of the list", self._place)
                return
            if listed and number > 1:
                if character != ",":
                    raise self._error("expected a comma or the end of the list", self._place)
                self._move(1)
                self._next()
            where = f"{self.file.path}, line {self._line}" + (f" (row {number})" if listed else "")
            yield where, self._value()

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = (
                    error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 10
                )
                if cut and self._more():
                    continue
                raise self._error(error.msg, min(error.pos, len(self._text))) from error
            except RecursionError as error:
                raise self._error("nested too deeply", self._place) from error
            self._move(end - self._place)
            return value

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            assert space is not None, "it matches nothing as well"
            self._move(space.end() - self._place)
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _move(self, count: int) -> None:
        self._line += self._text.count("\n", self._place, self._place + count)
        self._place += count

    def _more(self) -> bool:
        """Read on, at least as much again as is there; whether there was anything."""
        rest = self._text[self._place :]
        self.file._check_length(rest, self._line)
        parts, size = [rest], 0
        for block in self._blocks:
            parts.append(block)
            size += len(block)
            if size > len(rest):
                break
        self._text, self._place = "".join(parts), 0
        return size > 0

    def _error(self, what: str, place: int) -> SvskError:
        line = self._line + self._text.count("\n", self._place, place)
        return SvskError(f"{self.file.path}, line {line}: not JSON ({what}).")


def _after_break(text: str) -> str:
    """A text without its first, broken line; without its first word where the line is long."""
    place = text.find("\n", 0, 2000) + 1
    if not place:
        place = next((i + 1 for i, letter in enumerate(text[:200]) if letter.isspace()), 0)
    return text[place:]
