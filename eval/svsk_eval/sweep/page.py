# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of a page of docs/benchmarks, made of files of ``svsk sweep``.

    python -m svsk_eval.sweep.page docs/benchmarks/peers.md

The page says itself what of: between a line as the first of these and the last one there is
nothing but what this command writes. Names are relative to the page.

    <!-- sweep data/qwen.json data/qwen-dithered.json, figure qwen.svg -->
    <!-- end of sweep -->

Files that share a table were scored on the same tokens. Those of one reference have their rows
together; of several references each has a group, as the KL of its rows is to its own reference.
"""

import re
from pathlib import Path
from typing import Annotated, Final

import typer

from svsk_eval.errors import EvalError
from svsk_eval.report.markdown import table_lines
from svsk_eval.sweep.figure import sweep_figure
from svsk_eval.sweep.schema import SweepReport, load_sweep
from svsk_eval.sweep.tables import failures, sweep_table
from svsk_kernels.errors import SvskError
from svsk_offline.command_app import App
from svsk_offline.storage.atomic import write_text

__all__ = ["by_reference", "filled"]

_END: Final = "<!-- end of sweep -->"
_PART: Final = re.compile(
    r"^<!-- sweep (?P<files>[^,\n]+)(?:, figure (?P<figure>\S+))? -->\n"
    r".*?^<!-- end of sweep -->$",
    re.MULTILINE | re.DOTALL,
)

app = App(add_completion=False)


@app.command()
def main(
    page: Annotated[Path, typer.Argument(help="Markdown file, rewritten in place.")],
) -> None:
    """Write tables and figures of PAGE anew from the files that it names."""
    try:
        text, figures = filled(page)
    except SvskError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    for name, svg in figures.items():
        write_text(page.parent / name, svg)
    write_text(page, text)
    typer.echo(" and ".join(map(str, (page, *figures))))


def filled(page: Path) -> tuple[str, dict[str, str]]:
    """A page with its tables made anew, and its figures, SVG by name.

    Raises:
        EvalError: the page cannot be read or names no file, a file is missing or damaged, or files
            of one table were scored on different texts or have the same rows.
    """
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise EvalError(
            f"{page}: cannot read it ({error.strerror}). Name a page with a part to fill."
        ) from error
    figures: dict[str, str] = {}

    def part(match: re.Match[str]) -> str:
        names = match["files"].split()
        reports = [load_sweep(page.parent / name) for name in names]
        _check_common(names, reports)
        table = sweep_table(by_reference(reports), page.stem)
        lines = [match[0].partition("\n")[0], "", *table_lines(table), "", table.note]
        notes = [text for report in reports for text in failures(report)]
        lines += ["", *(f"- Could not be done: {text}" for text in notes)] if notes else []
        drawn = sweep_figure(reports) if match["figure"] else None
        if drawn is not None:
            figures[match["figure"]] = drawn.svg.decode()
            lines += ["", f"![{drawn.title}]({match['figure']})", "", drawn.caption]
        lines += ["", *map(_origin, names, reports)]
        return "\n".join([*lines, "", _END])

    new, count = _PART.subn(part, old)
    if not count:
        raise EvalError(
            f"{page}: has no part to fill. Write the lines `<!-- sweep data/FILE.json -->` and"
            f" `{_END}` into it."
        )
    return new, figures


def by_reference(reports: list[SweepReport]) -> list[SweepReport]:
    """One report for each reference, with the rows of all reports on it.

    Raises:
        EvalError: two reports on a reference have different rows of one label.
    """
    merged: dict[str, SweepReport] = {}
    for report in reports:
        key = str(report.settings.get("model"))
        if key not in merged:
            merged[key] = report
            continue
        rows = {row.label: row for row in merged[key].rows}
        for row in report.rows[1:]:
            if rows.setdefault(row.label, row) != row:
                raise EvalError(f"{row.label}: is in two files of {report.model}. Leave one out.")
        merged[key] = merged[key].model_copy(update={"rows": tuple(rows.values())})
    return list(merged.values())


def _origin(name: str, report: SweepReport) -> str:
    text = report.settings["calibration"]
    drawn = f"{text['samples']} x {text['seq_len']} tokens of {text['source']}"
    scored = f"{report.settings['chunks']} x {report.settings['seq_len']} of"
    return (
        f"- [{name}]({name}): calibrated on {drawn}, scored on {scored}"
        f" {report.settings['text']['name']}; {report.hardware}, {report.created[:10]}."
    )


def _check_common(names: list[str], reports: list[SweepReport]) -> None:
    def common(report: SweepReport) -> dict[str, object]:
        return {key: report.settings.get(key) for key in ("text", "chunks", "seq_len", "tables")}

    for name, report in zip(names, reports, strict=True):
        if common(report) != common(reports[0]):
            raise EvalError(
                f"{name} cannot share a table with {names[0]}: it has {common(report)}, expected"
                f" {common(reports[0])}. Give each a table of its own."
            )


if __name__ == "__main__":
    app()
