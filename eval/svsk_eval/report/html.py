# SPDX-License-Identifier: Apache-2.0
"""A report of task scores as one HTML page that needs nothing else.

No network, no scripts, no other files.
"""

from pathlib import Path

import jinja2
from markupsafe import Markup

from svsk_eval.report.analysis import Analysis, as_analysis
from svsk_eval.report.plots import Plot, all_plots, model_style
from svsk_eval.report.schema import BenchReport
from svsk_eval.report.tables import (
    HOW_TO_READ,
    METHODS,
    Column,
    Strong,
    all_tables,
    data_in_words,
    run_facts,
)

__all__ = ["html_report"]

_TEMPLATE = "report.html.j2"
_SHAPES = {
    "o": '<circle cx="6" cy="6" r="4.5"/>',
    "s": '<path d="M2 2h8v8h-8z"/>',
    "^": '<path d="M6 1l5 9h-10z"/>',
    "D": '<path d="M6 .5l5.5 5.5-5.5 5.5-5.5-5.5z"/>',
    "v": '<path d="M6 11l5-9h-10z"/>',
    "P": '<path d="M4 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
    "X": (
        '<path d="M3.5 1l2.5 2.5 2.5-2.5 2.5 2.5-2.5 2.5 2.5 2.5-2.5 2.5-2.5-2.5-2.5 2.5-2.5-2.5'
        ' 2.5-2.5-2.5-2.5z"/>'
    ),
    "<": '<path d="M1 6l9-5v10z"/>',
    ">": '<path d="M11 6l-9-5v10z"/>',
}
"""Matplotlib's markers for the legend, 12 x 12."""


def html_report(report: BenchReport | Analysis) -> str:
    """Write a report as an HTML page.

    Args:
        report: of ``svsk bench``, or its comparisons if they were already computed.

    Returns:
        The page, which is the same for the same report and versions of the packages.

    Raises:
        EvalError: the models cannot be compared.
    """
    analysis = as_analysis(report)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(_TEMPLATE).render(
        analysis=analysis,
        report=analysis.report,
        facts=run_facts(analysis),
        tables=all_tables(analysis),
        plots=all_plots(analysis),
        methods=METHODS,
        how_to_read=HOW_TO_READ,
        smallest=min(len(task.doc_ids) for task in analysis.reference.tasks.values()),
        data=data_in_words(analysis),
        cell=_cell,
        legend=lambda plot: _legend(analysis, plot),
        svg=lambda plot: Markup(plot.svg),
    )


def _cell(text: str, column: Column) -> Markup:
    """A cell's content: numbers get a minus sign in the place of the hyphen, which is too short."""
    shown = Markup.escape(text.replace("-", "\N{MINUS SIGN}") if column.numeric else text)
    return Markup("<strong>{}</strong>").format(shown) if isinstance(text, Strong) else shown


def _legend(analysis: Analysis, plot: Plot) -> list[tuple[str, Markup]]:
    """The models of a plot, and their markers as ``svg`` elements."""
    found = []
    for label in plot.labels:
        colour, marker = model_style(analysis, label)
        attributes = Markup(
            '<svg class="key" viewBox="0 0 12 12" fill="{}" aria-hidden="true">'
        ).format(colour)
        found.append((label, attributes + Markup(_SHAPES[marker]) + Markup("</svg>")))
    return found
