# SPDX-License-Identifier: Apache-2.0
"""A report of task scores as one HTML page that needs nothing else.

No network, no scripts, no other files.
"""

import base64
from pathlib import Path

import jinja2
from markupsafe import Markup

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.cells import Column, Strong
from svsk_eval.report.plots import all_plots
from svsk_eval.report.tables import (
    HOW_TO_READ,
    METHODS,
    all_tables,
    data_in_words,
    run_facts,
)

__all__ = ["html_report"]

_TEMPLATE = "report.html.j2"


def html_report(analysis: Analysis) -> str:
    """A report as an HTML page, the same for the same report and versions of the packages."""
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
        base64=lambda data: base64.b64encode(data).decode(),
    )


def _cell(text: str, column: Column) -> Markup:
    """A cell's content: numbers get a minus sign in the place of the hyphen, which is too short."""
    shown = Markup.escape(text.replace("-", "\N{MINUS SIGN}") if column.numeric else text)
    return Markup("<strong>{}</strong>").format(shown) if isinstance(text, Strong) else shown
