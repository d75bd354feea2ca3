# SPDX-License-Identifier: Apache-2.0
"""A report of task scores as Markdown, with GitHub's tables."""

import re
from collections.abc import Iterator

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.cells import Strong, Table
from svsk_eval.report.tables import HOW_TO_READ, METHODS, all_tables, run_facts

__all__ = ["markdown_report", "table_lines"]

_ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown_report(analysis: Analysis) -> str:
    """A report as Markdown, the same for the same report."""
    lines = ["# Task scores", ""]
    lines += [f"- {name}: {_escape(value)}" for name, value in run_facts(analysis)]
    lines += ["", *_code(analysis.report.command)]
    for table in all_tables(analysis):
        lines += ["", f"## {table.title}", "", *table_lines(table)]
        if table.note:
            lines += ["", _escape(table.note)]
    notes = analysis.all_notes()
    if notes:
        lines += ["", "## Notes", "", *(f"- {_escape(note)}" for note in notes)]
    lines += ["", "## How to read this", "", *(f"- {_escape(text)}" for text in HOW_TO_READ)]
    lines += ["", "## Methods", "", *(f"- {_escape(text)}" for text in METHODS)]
    return "\n".join(lines) + "\n"


def table_lines(table: Table) -> Iterator[str]:
    """A table as Markdown, line by line."""
    yield _row(_escape(column.heading) for column in table.columns)
    yield _row("---:" if column.numeric else "---" for column in table.columns)
    for group in table.groups:
        for row in group:
            yield _row(
                f"**{_escape(cell)}**" if isinstance(cell, Strong) else _escape(cell)
                for cell in row
            )


def _row(cells: Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Text that shows as it is, also in a table: no markup, no HTML, one line."""
    text = re.sub(r"[&<>]", lambda match: _ESCAPED[match[0]], " ".join(text.split()))
    return re.sub(r"[\\`*|~]|(?<!\w)_|_(?!\w)|\[(?=[^\]]*\]\()", r"\\\g<0>", text)


def _code(text: str) -> list[str]:
    """A block of code, fenced by more backticks than it holds in a row."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, *text.splitlines(), fence]
