# SPDX-License-Identifier: Apache-2.0
"""Text that somebody else wrote, made harmless for a terminal and a page."""

from typing import Final

__all__ = ["printable"]

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_KEPT: Final = "\n\t"


def printable(text: str) -> str:
    """A text with every control character but line breaks and tabs replaced."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _REPLACEMENT for c in text)
