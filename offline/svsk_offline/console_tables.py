# SPDX-License-Identifier: Apache-2.0
"""Tables on the console, all in one look."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["new_table", "show_table"]

_ANY_WIDTH: Final = 10_000
"""Characters: more than any table has."""


def new_table(*headings: str, numbers: Collection[int] = ()) -> "Table":
    """An empty table in the look of all commands.

    Args:
        headings: of its columns.
        numbers: places of the columns that hold numbers, from 0.
    """
    from rich.box import SIMPLE_HEAD  # takes a while; most commands show no table
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place in numbers else "left", overflow="fold")
    return table


def show_table(on: "Console", table: "Table") -> None:
    """Show a table; where no terminal limits its width, with no line broken."""
    from rich.measure import Measurement

    width = on.width
    if not on.is_terminal:
        unlimited = on.options.update(max_width=_ANY_WIDTH)
        on.width = max(width, Measurement.get(on, unlimited, table).maximum)
    try:
        on.print(table)
    finally:
        on.width = width
