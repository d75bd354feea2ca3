# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's report as one HTML page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from svsk_eval.checkpoint.contents import CheckpointContents
from svsk_eval.checkpoint.plots import bit_plots, error_plots, text_plots
from svsk_eval.checkpoint.recipe import recipe_yaml
from svsk_eval.checkpoint.suggestions import Suggestion
from svsk_eval.checkpoint.tables import (
    TextFigures,
    bit_tables,
    error_tables,
    facts,
    place_table,
    text_tables,
)
from svsk_eval.report.page import render_page

__all__ = ["checkpoint_page"]

_TEMPLATE: Final = Path(__file__).with_name("page.html.j2")


def checkpoint_page(
    contents: CheckpointContents,
    missing: Sequence[str],
    suggested: Sequence[Suggestion],
    figures: TextFigures | None = None,
) -> str:
    """A report as an HTML page, the same for the same figures and versions of the packages.

    Args:
        contents: of the checkpoint.
        missing: what is not in the report, and why, in sentences.
        suggested: what follows from the figures.
        figures: of a text that was scored, if one was.
    """
    return render_page(
        _TEMPLATE,
        name=contents.folder.resolve().name,
        facts=facts(contents),
        missing=missing,
        suggestions=suggested,
        bit_tables=bit_tables(contents),
        bit_plots=bit_plots(contents),
        error_plots=error_plots(contents),
        error_tables=error_tables(contents),
        text_tables=[] if figures is None else text_tables(figures),
        text_plots=[] if figures is None else text_plots(figures),
        places=place_table(contents),
        recipe=recipe_yaml(contents),
    )
