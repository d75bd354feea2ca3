# SPDX-License-Identifier: Apache-2.0
"""What ``svsk bench`` and ``svsk compare`` show of task scores."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.cells import Strong, Table
from svsk_eval.report.tables import METHODS, all_tables
from svsk_offline.console_tables import new_table, show_table

__all__ = ["print_report", "print_table"]


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
    show_table(console, _draw(table))


def _draw(table: Table) -> RichTable:
    """The table; where rows are in groups, the group's name has a row of its own above them."""
    grouped = max(map(len, table.groups)) > 1
    columns = table.columns[1:] if grouped else table.columns
    drawn = new_table(
        *(escape(column.heading) for column in columns),
        numbers=[place for place, column in enumerate(columns) if column.numeric],
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
