# SPDX-License-Identifier: Apache-2.0
"""Text that somebody else wrote, made harmless for a terminal and a page."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

__all__ = ["html_table", "printable"]

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_KEPT: Final = "\n\t"


def printable(text: str) -> str:
    """A text with every control character but line breaks and tabs replaced."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _REPLACEMENT for c in text)


def html_table(headings: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> str:
    """A table as HTML; whatever the cells hold is shown as text."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{escape(printable(str(value)))}</{tag}>" for value in values)

    head = cells("th", headings)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    below = f"<p>{escape(printable(note))}</p>" if note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"
