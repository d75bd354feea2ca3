# SPDX-License-Identifier: Apache-2.0
"""What ``svsk report`` does: read, score if it is asked to, show, and write the page.

Torch is imported for scoring only.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from svsk_eval.checkpoint.contents import CheckpointContents, read_checkpoint
from svsk_eval.checkpoint.suggestions import suggestions
from svsk_eval.checkpoint.tables import (
    TextFigures,
    bit_tables,
    error_tables,
    facts,
    text_tables,
)
from svsk_eval.errors import EvalError, packages_of_pages
from svsk_eval.report.console import print_table
from svsk_offline.storage.layer_report import REPORT_NAME

if TYPE_CHECKING:
    from svsk_eval.text.request import TextRequest

__all__ = ["check_options", "missing_parts", "report_checkpoint"]


def check_options(*, reference: str | None, text: Path | None, html: Path | None) -> None:
    """Refuse half of what scoring needs, and a page without the packages for it.

    Raises:
        EvalError: a text is given without a reference, or the reverse; or a package is absent.
    """
    if text is not None and reference is None:
        raise EvalError(
            f"--text {text}: KL needs the model that was quantised. Give it with --reference, or"
            " leave --text out."
        )
    if reference is not None and text is None:
        raise EvalError(
            f"--reference {reference}: there is no text to compare on. Give one with --text, or"
            " leave --reference out."
        )
    if html is not None:
        with packages_of_pages():
            import svsk_eval.checkpoint.page  # noqa: F401


def report_checkpoint(
    console: Console,
    folder: Path,
    *,
    html: Path | None = None,
    request: "TextRequest | None" = None,
    notes: Console | None = None,
) -> dict[str, Any]:
    """Show a report of a checkpoint, write its page, and return the figures JSON-ready.

    Args:
        console: where it is shown.
        folder: the checkpoint.
        html: the page to write, if any.
        request: a text to score on and the reference, if any.
        notes: where progress is shown; ``console`` if None.

    Raises:
        SvskFormatError: it is no readable SVSK checkpoint, or its measurements are damaged.
        EvalError: the text cannot be scored, see :func:`svsk_eval.text.scoring.evaluate`.
    """
    contents = read_checkpoint(folder)
    figures = None if request is None else _scored(console, request, notes)
    missing = missing_parts(contents, figures)
    suggested = suggestions(contents, () if figures is None else figures.kinds)
    for name, value in facts(contents):
        console.print(f"{name}: {value}", markup=False)
    about_text = text_tables(figures)[1:] if figures else ()  # the first is shown when it is scored
    for table in (*bit_tables(contents), *error_tables(contents), *about_text):
        print_table(console, table)
    for text in missing:
        console.print(f"not in this report: {text}", markup=False)
    for suggestion in suggested:
        console.print(f"worth a try: {suggestion.text}", markup=False)
    if html is not None:
        from svsk_eval.checkpoint.page import checkpoint_page
        from svsk_offline.storage.atomic import write_text

        write_text(html, checkpoint_page(contents, missing, suggested, figures))
        console.print(f"wrote {html}, {html.stat().st_size / 1e3:.0f} kB", markup=False)
    return {
        **contents.inspection,
        "target_bpw": contents.target,
        "measured": contents.measured,
        "matrices": [matrix.to_json() for matrix in contents.matrices],
        "dense_tables": [asdict(table) for table in contents.dense_tables],
        "missing": missing,
        "suggestions": [asdict(suggestion) for suggestion in suggested],
        "text": None if figures is None else _figures_json(figures),
    }


def missing_parts(contents: CheckpointContents, figures: TextFigures | None) -> list[str]:
    """What a report of this checkpoint lacks, and why, in sentences."""
    missing = []
    if not contents.measured:
        missing.append(
            f"Errors of matrices: the folder has no {REPORT_NAME}, in which a run keeps what it"
            " measures. It was quantised by a version before that, or the file was not copied;"
            " quantise it again to have them."
        )
    if not contents.recipe:
        missing.append(
            "The recipe: config.json records none. `svsk quantize` writes it there; another program"
            " or an older version wrote this checkpoint."
        )
    if figures is None:
        missing.append(
            "KL by position and kind of token: give --reference and --text to score a text."
        )
    return missing


def _scored(console: Console, request: "TextRequest", notes: Console | None) -> TextFigures:
    """Score the text, and group the KL of its tokens."""
    import numpy as np

    from svsk_eval.text.by_token import by_kind, by_position, kinds_of_tokens
    from svsk_eval.text.console import evaluate_with_progress
    from svsk_eval.text.models import load_tokenizer

    tokens, scored = [], []

    def each(chunk: Any, scores: Any) -> None:
        tokens.append(chunk.numpy())
        scored.append(scores.kl)

    result = evaluate_with_progress(console, request, notes, each)
    kl = np.stack(scored)
    tokenizer = load_tokenizer(request.model, trust_remote_code=request.trust_remote_code)
    kinds = kinds_of_tokens(tokenizer, np.stack(tokens))
    return TextFigures(request.text.name, result, by_kind(kl, kinds), by_position(kl))


def _figures_json(figures: TextFigures) -> dict[str, Any]:
    return {
        "file": figures.text,
        "scores": figures.scores,
        "kinds": [asdict(group) for group in figures.kinds],
        "positions": [asdict(group) for group in figures.positions],
    }
