# SPDX-License-Identifier: Apache-2.0
"""Counts the messages of errors that a test reads, and keeps the list of those that none does.

    python .ci/messages_read.py [--write]

The messages are those of messages_page.py. A test reads one where a string in it, or a pattern for
``match=``, could stand in that message and no other: three words or more in a row are the message's
own (all of its words, where it has no three in a row), what is around them agrees as well (anything
agrees with a value that is put in), and no other message fits as closely. Not looked at are
docstrings, what a test raises itself, what it says when it fails, and what it expects not to find.
Whether a test runs is not asked, only what it says.

Without ``--write`` the command prints counts per folder and says whether the list,
messages_unread.txt, is current. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final

import messages_page

__all__ = ["LIST", "Messages", "list_text", "literals", "pattern_texts", "unread"]

ROOT: Final = Path(__file__).resolve().parents[1]
LIST: Final = Path(__file__).with_name("messages_unread.txt")
_GAP: Final = "\0"
"""Stands for any text: a value put into a message, or what a pattern leaves open."""
_WORDS_IN_A_ROW: Final = 3
_RARE: Final = 16
"""Messages: a word in fewer tells messages apart that agree equally well."""
_WORD: Final = re.compile(r"[A-Za-z](?:[\w.'-]*\w)?")
_LONGEST: Final = 1000
"""Characters of a string that is looked at: programs and documents have more."""
_MOST_BRANCHES: Final = 16
"""Of a pattern: one with more is not looked at."""

Message = tuple[str, str]
"""The file that raises it, and its words."""


class Messages:
    """Messages by the rows of words that they consist of."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self.files: dict[str, list[str]] = {}
        for file, text in messages:
            self.files.setdefault(text, []).append(file)
        self._frequency: Counter[str] = Counter()
        self._rows: dict[tuple[str, ...], list[tuple[str, str, int]]] = {}
        for text in self.files:
            shape = re.sub(r"<[^<>]*>| / ", _GAP, text)
            self._frequency.update(set(_words(shape)))
            length = min(_WORDS_IN_A_ROW, max(len(_words(part)) for part in shape.split(_GAP)))
            for row, place in _rows(shape, length):
                self._rows.setdefault(row, []).append((text, shape, place))

    def read_by(self, literal: str, test: str) -> set[Message]:
        """The message that a string of a test can only be about; none if there are several.

        Args:
            literal: The string, with ``_GAP`` where anything may stand.
            test: The test's path from the root. It tells messages of the same words apart, where
                one of them is raised in the folder that the test's folder is named after.
        """
        words = set(_words(literal))
        closeness: dict[str, tuple[int, int]] = {}
        rows = (row for length in range(1, 1 + _WORDS_IN_A_ROW) for row in _rows(literal, length))
        for row, place in rows:
            for text, shape, there in self._rows.get(row, ()):
                if len(row) < _WORDS_IN_A_ROW and not words.issuperset(_words(shape)):
                    continue
                same = _agreeing(literal, place, shape, there)
                if same >= len(row):
                    rare = sum(self._frequency[word] < _RARE for word in words & set(_words(shape)))
                    closeness[text] = max(closeness.get(text, (0, 0)), (same, rare))
        best = [text for text, close in closeness.items() if close == max(closeness.values())]
        if len(best) != 1:
            return set()
        files = self.files[best[0]]
        if len(files) > 1:
            files = [file for file in files if _subject(file) == _subject(test)]
            named = Path(test).stem.removeprefix("test_")
            files = [file for file in files if Path(file).stem == named] or files
        return {(file, best[0]) for file in files} if len(files) == 1 else set()


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _rows(text: str, length: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """So many words that follow each other without a gap, and their place."""
    for part in re.finditer(f"[^{_GAP}]+", text):
        found = list(_WORD.finditer(part[0]))
        for first in range(len(found) - length + 1):
            row = found[first : first + length]
            yield tuple(word[0] for word in row), part.start() + row[0].start()


def _agreeing(literal: str, place: int, shape: str, there: int) -> int:
    """How many words in a row are the same at these places; 0 where the rest does not fit."""
    same = 0
    for ours, theirs in zip(literal[place:], shape[there:], strict=False):
        if ours != theirs or ours == _GAP:
            break
        same += 1
    number = len(_words(literal[place : place + same]))
    fits = _fits(literal[place + same :], shape[there + same :]) and _fits(
        literal[:place][::-1], shape[:there][::-1]
    )
    return number if fits else 0


def _fits(literal: str, shape: str) -> bool:
    """Whether the literal may stand at the beginning of what the shape may be."""

    def over_gaps(places: set[int]) -> set[int]:
        found = set(places)
        for place in places:
            while place < len(shape) and shape[place] == _GAP:
                place += 1
                found.add(place)
        return found

    places = over_gaps({0})
    for letter in literal:
        if letter == _GAP:
            places = set(range(min(places), len(shape) + 1))
            continue
        places = over_gaps(
            {place for place in places if place < len(shape) and shape[place] == _GAP}
            | {place + 1 for place in places if place < len(shape) and shape[place] == letter}
        )
        if not places:
            return False
    return True


def _subject(path: str) -> tuple[str, ...]:
    """What a folder of code or of its tests is about, such as ``("eval", "bench")``."""
    folders = path.split("/")[:-1]
    if folders[0] in ("tests", "svsk_vllm"):
        return tuple(folders[1:])
    return tuple(folders[:1] + folders[2:])


def pattern_texts(pattern: str) -> list[str]:
    """What a regular expression says, with a gap for each part that it leaves open."""
    with warnings.catch_warnings(action="ignore"):  # most strings are no patterns
        try:
            parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]
        except re.error:
            return []
    return _pattern_texts(parsed)


def _pattern_texts(parsed: Iterable[tuple[Any, Any]]) -> list[str]:
    parts: list[list[str]] = []
    for kind, value in parsed:
        match str(kind):
            case "LITERAL":
                parts.append([chr(value)])
            case "SUBPATTERN":
                parts.append(_pattern_texts(value[3]))
            case "BRANCH":
                parts.append([text for branch in value[1] for text in _pattern_texts(branch)])
            case "AT" | "ASSERT" | "ASSERT_NOT":
                pass
            case _:
                parts.append([_GAP])
    number = 1
    for part in parts:
        number *= len(part)
    return ["".join(choice) for choice in product(*parts)] if number <= _MOST_BRANCHES else []


def literals(tree: ast.AST) -> Iterator[str]:
    """The strings that a test may compare a message with, with gaps for values put in."""
    match tree:
        case ast.Raise() | ast.Expr(value=ast.Constant()):
            return
        case ast.Assert(test=test):
            yield from literals(test)
        case ast.Compare(left=left, ops=[ast.NotIn()], comparators=[right]):
            if not isinstance(left, ast.Constant | ast.JoinedStr):
                yield from literals(left)
            yield from literals(right)
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else _GAP for part in parts
            )
        case ast.keyword(arg="reason" | "ids"):
            return
        case _:
            for child in ast.iter_child_nodes(tree):
                yield from literals(child)


def all_messages() -> list[Message]:
    """Every message, in the order of the page."""
    classes = messages_page.error_classes()
    return [
        (path.relative_to(ROOT).as_posix(), text)
        for path, tree in messages_page.trees().items()
        for text in messages_page.messages(tree, classes)
    ]


def unread(messages: list[Message], tests: dict[str, ast.AST]) -> list[Message]:
    """The messages that none of the tests (trees by path) reads."""
    known, found = Messages(messages), set()
    for test, tree in tests.items():
        for literal in set(literals(tree)):
            if " " in literal and len(literal) < _LONGEST:
                for text in {literal, *pattern_texts(literal)}:
                    found |= known.read_by(" ".join(text.split()), test)
    return [message for message in messages if message not in found]


def list_text(messages: list[Message]) -> str:
    """What the list says of these messages."""
    return "".join(f"{file}: {text}\n" for file, text in messages)


def unread_now() -> list[Message]:
    """The messages of the packages that no test in tests/ reads."""
    tests: dict[str, ast.AST] = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.parent.name != "setup"  # of these tools, with messages as examples
    }
    return unread(all_messages(), tests)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the list")
    write = parser.parse_args().write
    every, left = all_messages(), unread_now()
    counts: dict[str, list[int]] = {}
    for row, messages in enumerate((every, left)):
        for file, _ in messages:
            counts.setdefault(file.rpartition("/")[0], [0, 0])[row] += 1
    for folder, (number, missing) in counts.items():
        print(f"{folder}: {number - missing} of {number}")
    print(f"Read by a test: {len(every) - len(left)} of {len(every)} messages.")
    if write:
        LIST.write_text(list_text(left), encoding="utf-8")
    elif not LIST.is_file() or LIST.read_text(encoding="utf-8") != list_text(left):
        print(f"{LIST.name} is not up to date: python .ci/messages_read.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
