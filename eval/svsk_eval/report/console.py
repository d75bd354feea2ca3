# SPDX-License-Identifier: Apache-2.0
"""What ``svsk bench`` and ``svsk compare`` show of task scores."""

from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table as RichTable

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.cells import Strong, Table
from svsk_eval.report.tables import METHODS, all_tables

__all__ = ["print_report", "print_table"]

_ANY: Final = 10_000


def print_report(console: Console, analysis: Analysis) -> None:
    """Show all tables of a report, and how its figures were computed.

    In a narrow terminal cells are folded, elsewhere tables keep their width: no figure is cut off
    in a log.
    """
    for table in all_tables(analysis):
        print_table(console, table)
    for line in (*METHODS, *(f"note: {note}" for note in analysis.all_notes())):
        console.print(line, markup=False)


def print_table(console: Console, table: Table) -> None:
    """Show a table with its heading and the sentence below that."""
    console.print(f"[bold]{escape(table.title)}[/bold]")
    if table.note:
        console.print(table.note, markup=False)
    _print(console, _draw(table))


def _print(console: Console, table: RichTable) -> None:
    width = console.width
    if not console.is_terminal:
        console.width = max(
            width, Measurement.get(console, console.options.update(max_width=_ANY), table).maximum
        )
    try:
        console.print(table)
    finally:
        console.width = width


def _draw(table: Table) -> RichTable:
    """The table; where rows are in groups, the group's name has a row of its own above them."""
    grouped = max(map(len, table.groups)) > 1
    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in table.columns[1:] if grouped else table.columns:
        drawn.add_column(
            escape(column.heading), justify="right" if column.numeric else "left", overflow="fold"
        )
    for group in table.groups:
        if grouped:
            drawn.add_row(f"[bold]{escape(group[0][0])}[/bold]")
        for row in group:
            cells = [
                f"[bold]{escape(cell)}[/bold]" if isinstance(cell, Strong) else escape(cell)
                for cell in row
            ]
            drawn.add_row(
                *(cells[1:] if grouped else cells), end_section=grouped and row is group[-1]
            )
    return drawn
