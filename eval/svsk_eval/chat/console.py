# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval --chat`` shows, and what ``svsk compare`` shows of such files."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from svsk_eval.chat.compare import compare_chat_files, has_chat, has_text
from svsk_eval.chat.metrics import ChatScores
from svsk_eval.chat.scoring import PreparedChat, evaluate_chat
from svsk_eval.text.compare import compare_files
from svsk_eval.text.console import COMPARED, print_comparisons
from svsk_eval.text.models import silence_progress_bars

__all__ = ["compare_scores_and_print", "evaluate_chat_with_progress", "print_chat"]

_ROWS: Final = (
    ("kl", "KL(reference || model), mean", ".5f"),
    ("delta_nll", "delta NLL", ".5f"),
    ("top1", "top-1 agreement", ".4f"),
    ("end_kl", "KL at the end of an answer", ".5f"),
    ("end_probability", "probability of ending there", ".4f"),
    ("ref_end_probability", "the same of the reference", ".4f"),
    ("early_end", "probability of ending sooner", ".4f"),
    ("ref_early_end", "the same of the reference", ".4f"),
)

_CHAT_COMPARED: Final = (
    *COMPARED,
    ("end_kl", "KL at the end", ".5f"),
    ("end_probability", "ends there", ".4f"),
    ("early_end", "ends sooner", ".4f"),
)


def evaluate_chat_with_progress(console: Console, prepared: PreparedChat) -> ChatScores:
    """Score a model on its reference's answers with a progress bar, and show the figures.

    Raises:
        SvskError: see :func:`svsk_eval.chat.scoring.evaluate_chat`.
    """
    silence_progress_bars()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("answers", total=len(prepared.order))

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=what)

        scores = evaluate_chat(prepared, show)
    print_chat(console, scores)
    return scores


def print_chat(console: Console, scores: ChatScores) -> None:
    """Show the figures of answers with their standard errors over prompts."""
    figures = scores.figures()
    table = Table("figure on the reference's answers", "value", "standard error")
    for key, label, form in _ROWS:
        if key in figures:
            figure = figures[key]
            error = "" if figure.se is None else format(figure.se, form)
            table.add_row(label, format(figure.mean, form), error)
    console.print(table)
    console.print(
        f"{scores.tokens} tokens in answers to {scores.prompts} prompts; {scores.finished} answers"
        f" ended by themselves, the others at the limit of {scores.answer_tokens} tokens"
    )
    if not scores.finished:
        console.print("No answer ended: raise --answer-tokens to see the ends.")


def compare_scores_and_print(console: Console, files: Sequence[Path]) -> dict[str, Any]:
    """Compare what all files hold: scores of a text, of answers, or of both; JSON-ready.

    Raises:
        EvalError: see :func:`svsk_eval.text.compare.compare_files` and
            :func:`svsk_eval.chat.compare.compare_chat_files`.
    """
    chat = all(map(has_chat, files))
    result: dict[str, Any] = {"baseline": str(files[0])}
    if not chat or all(map(has_text, files)):
        comparisons = compare_files(files)
        print_comparisons(console, files[0], comparisons)
        result["comparisons"] = [asdict(comparison) for comparison in comparisons]
    if chat:
        comparisons = compare_chat_files(files)
        console.print("On the reference's answers, by prompt:")
        print_comparisons(console, files[0], comparisons, _CHAT_COMPARED)
        result["chat"] = [asdict(comparison) for comparison in comparisons]
    return result
