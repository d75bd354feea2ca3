# SPDX-License-Identifier: Apache-2.0
"""A report of task scores as one HTML page that needs nothing else."""

from pathlib import Path
from typing import Final

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.page import render_page
from svsk_eval.report.plots import all_plots
from svsk_eval.report.tables import (
    HOW_TO_READ,
    METHODS,
    all_tables,
    data_in_words,
    run_facts,
)

__all__ = ["html_report"]

_TEMPLATE: Final = Path(__file__).with_name("report.html.j2")


def html_report(analysis: Analysis) -> str:
    """A report as an HTML page, the same for the same report and versions of the packages."""
    return render_page(
        _TEMPLATE,
        analysis=analysis,
        report=analysis.report,
        facts=run_facts(analysis),
        tables=all_tables(analysis),
        plots=all_plots(analysis),
        methods=METHODS,
        how_to_read=HOW_TO_READ,
        smallest=min(len(task.doc_ids) for task in analysis.reference.tasks.values()),
        data=data_in_words(analysis),
    )
