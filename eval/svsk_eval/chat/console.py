# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval --chat`` shows."""

from typing import Final

from rich.console import Console

from svsk_eval.chat.metrics import ChatScores
from svsk_eval.chat.scoring import PreparedChat, evaluate_chat
from svsk_eval.text.models import silence_progress_bars
from svsk_offline.console_tables import new_table, show_table
from svsk_offline.terminal import steps

__all__ = ["evaluate_chat_with_progress", "print_chat"]

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


def evaluate_chat_with_progress(
    console: Console, prepared: PreparedChat, notes: Console | None = None
) -> ChatScores:
    """Score a model on its reference's answers with a progress bar, and show the figures.

    Args:
        console: where the figures are shown.
        prepared: what is scored.
        notes: where progress is shown; ``console`` if None.

    Raises:
        SvskError: see :func:`svsk_eval.chat.scoring.evaluate_chat`.
    """
    silence_progress_bars()
    with steps(notes or console, "answers", transient=True) as bar:
        scores = evaluate_chat(prepared, bar.update)
    print_chat(console, scores)
    return scores


def print_chat(console: Console, scores: ChatScores) -> None:
    """Show the figures of answers with their standard errors over prompts."""
    figures = scores.figures()
    headings = ("figure on the reference's answers", "value", "standard error")
    table = new_table(*headings, numbers=(1, 2))
    for key, label, form in _ROWS:
        if key in figures:
            figure = figures[key]
            error = "" if figure.se is None else format(figure.se, form)
            table.add_row(label, format(figure.mean, form), error)
    show_table(console, table)
    console.print(
        f"{scores.tokens} tokens in answers to {scores.prompts} prompts; {scores.finished} answers"
        f" ended by themselves, the others at the limit of {scores.answer_tokens} tokens"
    )
    if not scores.finished:
        console.print("No answer ended: raise --answer-tokens to see the ends.")
