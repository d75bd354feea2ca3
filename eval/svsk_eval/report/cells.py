# SPDX-License-Identifier: Apache-2.0
"""Tables of words, and figures as the words of a cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from svsk_eval.report.paired_statistics import Estimate, Interval

__all__ = [
    "DASH",
    "Column",
    "Strong",
    "Table",
    "difference",
    "make_table",
    "mean_with_se",
    "number",
    "p_value",
    "percent",
    "plus_minus",
    "size_in_words",
]

DASH: Final = "\N{EN DASH}"
"""Stands for a figure that there is none of."""


class Strong(str):
    """A cell that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """Heading of a column; ``numeric`` ones are aligned to the right."""

    heading: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Cells in words.

    Attributes:
        title: its heading.
        note: a sentence below the heading, or nothing.
        columns: their headings.
        groups: rows that belong together, one cell per column.
    """

    title: str
    note: str
    columns: tuple[Column, ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]


def make_table(
    title: str,
    words: Sequence[str],
    numbers: Sequence[str],
    groups: Sequence[Sequence[tuple[str, ...]]],
    note: str = "",
) -> Table:
    """A table whose first columns hold words and whose others hold numbers."""
    columns = (*(Column(heading, False) for heading in words), *map(Column, numbers))
    return Table(title, note, columns, tuple(map(tuple, groups)))


def number(value: float | None, form: str) -> str:
    """A figure in a format of Python's; a dash where there is none."""
    return DASH if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share in percent, or a dash."""
    return DASH if value is None else f"{100 * value:.1f}%"


def plus_minus(value: float | None, se: float | None, form: str) -> str:
    """A figure and its standard error in a format, or a dash."""
    if value is None:
        return DASH
    return format(value, form) + ("" if se is None else f" ± {se:{form.lstrip('+')}}")


def mean_with_se(mean: Estimate | None, form: str, scale: float = 1.0) -> str:
    """A mean with its standard error, both times ``scale``."""
    if mean is None:
        return DASH
    return plus_minus(scale * mean.value, None if mean.se is None else scale * mean.se, form)


def difference(value: float, interval: Interval | None, form: str, scale: float = 1.0) -> str:
    """A difference with its interval, both times ``scale``."""
    limits = (
        f" [{scale * interval.low:{form}}, {scale * interval.high:{form}}]"
        if interval
        else f" [{DASH}]"
    )
    return f"{scale * value:{form}}{limits}"


def p_value(value: float) -> str:
    """Three places, as far as they say something."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def size_in_words(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
