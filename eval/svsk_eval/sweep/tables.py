# SPDX-License-Identifier: Apache-2.0
"""The table of sweeps, which console and Markdown each draw in their own way."""

from collections.abc import Sequence

from svsk_eval.report.cells import (
    DASH,
    Column,
    Table,
    percent,
    plus_minus,
    size_in_words,
)
from svsk_eval.sweep.schema import Size, SweepReport, SweepRow, TextFigures

__all__ = ["failures", "sweep_table"]

_NOTE = (
    "Bits per weight with everything stored: of the blocks' linears, and of the whole file,"
    " embedding and output head among them. KL(reference || model) and delta NLL in nats per token,"
    " ± standard error over chunks. Recovery: mean over tasks of the score divided by the"
    " reference's."
)
_NOTE_WITHOUT_TASKS = _NOTE.partition(" Recovery:")[0]


def sweep_table(reports: Sequence[SweepReport], title: str) -> Table:
    """A row for each model; with several sweeps a group for each, as KL is to its own reference.

    Args:
        reports: sweeps of one text.
        title: the table's.
    """
    tasks = list(dict.fromkeys(name for one in reports for row in one.rows for name in row.tasks))
    headings = ["bits, linears", "bits, all", "size", "KL", "delta NLL", "top-1", *tasks]
    if tasks:
        headings.append("recovery")
    headings.append("quantised in")
    words = [Column("reference", False), Column("model", False)]
    columns = (*(words if len(reports) > 1 else words[1:]), *map(Column, headings))
    groups = []
    for report in reports:
        name = [report.model] if len(reports) > 1 else []
        shown = [row for row in report.rows if row.error is None]
        groups.append(tuple((*name, *_cells(row, tasks)) for row in shown))
    if len(reports) == 1:
        groups = [(row,) for row in groups[0]]
    return Table(title, _NOTE if tasks else _NOTE_WITHOUT_TASKS, columns, tuple(groups))


def failures(report: SweepReport) -> list[str]:
    """What could not be made or scored, and why, a line each."""
    return [f"{row.label}: {row.error}" for row in report.rows if row.error is not None]


def _cells(row: SweepRow, tasks: Sequence[str]) -> tuple[str, ...]:
    cells = [
        f"{row.title} (reference)" if row.kind == "reference" else row.title,
        *_size_cells(row.size),
        *_text_cells(row.text),
    ]
    for name in tasks:
        score = row.tasks.get(name)
        cells.append(DASH if score is None else plus_minus(score.score, score.score_se, ".4f"))
    if tasks:
        cells.append(DASH if row.recovery is None else percent(row.recovery.mean))
    seconds = None if row.size is None else row.size.seconds
    cells.append(DASH if seconds is None else f"{seconds:.0f} s")
    return tuple(cells)


def _size_cells(size: Size | None) -> tuple[str, str, str]:
    if size is None:
        return DASH, DASH, DASH
    return (
        f"{size.bits_per_weight:.4f}",
        f"{size.bits_per_weight_of_all:.4f}",
        size_in_words(size.size_bytes),
    )


def _text_cells(text: TextFigures | None) -> tuple[str, str, str]:
    if text is None:
        return DASH, DASH, DASH
    return (
        plus_minus(text.kl_mean, text.kl_mean_se, ".4f"),
        plus_minus(text.delta_nll, text.delta_nll_se, "+.4f"),
        plus_minus(text.top1, text.top1_se, ".4f"),
    )
