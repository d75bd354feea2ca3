# SPDX-License-Identifier: Apache-2.0
"""What ``svsk sweep`` does: run, show, and write table and figure."""

from pathlib import Path
from typing import Final

from rich.console import Console

from svsk_eval.report.console import print_table
from svsk_eval.report.markdown import table_lines
from svsk_eval.sweep.figure import sweep_figure
from svsk_eval.sweep.request import SweepRequest
from svsk_eval.sweep.schema import SweepReport
from svsk_eval.sweep.sweep import sweep
from svsk_eval.sweep.tables import failures, sweep_table
from svsk_offline.storage.atomic import write_text
from svsk_offline.terminal import steps

__all__ = ["sweep_with_progress", "write_report"]

NAME: Final = "sweep"
"""Of the report's files."""


def sweep_with_progress(
    console: Console, request: SweepRequest, notes: Console | None = None
) -> bool:
    """Run a sweep with a progress bar; show its table, and write it, the figure and the JSON file.

    ``notes`` is where progress is shown, ``console`` if None.

    Returns:
        Whether every model could be made and scored.

    Raises:
        SvskError: see :func:`svsk_eval.sweep.sweep.sweep`.
    """
    notes = notes or console
    with steps(notes, "starting", transient=True) as bar:
        last = ""

        def show(label: str, what: str, done: int, known: int) -> None:
            nonlocal last
            text = f"{label}: {what}"
            if text != last and (not notes.is_terminal or what.startswith("failed")):
                notes.print(text, markup=False)  # a log gets a line per step
            last = text
            bar.update(text, done, known or None)

        report = sweep(
            request,
            show,
            lambda text: notes.print(text, markup=False),
            lambda report: write_report(report, request.out),
        )
    print_table(console, sweep_table([report], _title(report)))
    missing = failures(report)
    for text in missing:
        console.print(f"could not be done: {text}", markup=False)
    files = ", ".join(f"{NAME}.{kind}" for kind in ("json", "md", "svg"))
    console.print(f"{files} in {request.out}", markup=False)
    return not missing


def write_report(report: SweepReport, folder: Path) -> None:
    """Write ``sweep.json``, ``sweep.md`` and ``sweep.svg``."""
    write_text(folder / f"{NAME}.json", report.model_dump_json(indent=1) + "\n")
    table, figure = sweep_table([report], _title(report)), sweep_figure([report])
    lines = [f"# {table.title}", "", *table_lines(table), "", table.note]
    if figure is not None:
        write_text(folder / f"{NAME}.svg", figure.svg.decode())
        lines += ["", f"![{figure.title}]({NAME}.svg)", "", figure.caption]
    lines += ["", *(f"- Could not be done: {text}" for text in failures(report))]
    lines += ["", f"{report.hardware}; {report.created}.", "", f"```\n{report.command}\n```"]
    write_text(folder / f"{NAME}.md", "\n".join(lines) + "\n")


def _title(report: SweepReport) -> str:
    return f"{report.model} at several sizes"
