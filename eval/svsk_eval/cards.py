# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval`` and ``svsk bench`` write into the card of the checkpoint they ran on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from svsk_offline.storage.card_figures import add_figures, shown_name

if TYPE_CHECKING:
    from svsk_eval.report.analysis import Analysis
    from svsk_eval.report.paired_statistics import Estimate

__all__ = ["bench_rows", "eval_rows", "note_in_card"]


def note_in_card(notes: Console, model: str, rows: Mapping[str, str]) -> None:
    """Add figures to the card of a checkpoint's folder, and say so; other models are left alone."""
    try:
        card = add_figures(Path(model), rows)
    except OSError as error:
        notes.print(f"{model}: its card stays as it is ({error.strerror})", markup=False)
        return
    if card is not None:
        notes.print(f"the figures are in {card}", markup=False)


def eval_rows(result: Mapping[str, Any], text: Path | None, chat: Path | None) -> dict[str, str]:
    """Rows of a card: of a text, and of the reference's answers.

    Args:
        result: what ``svsk eval --json`` writes.
        text: the file that was scored.
        chat: the file of prompts.
    """
    reference = result.get("reference")
    against = f", against {shown_name(reference)}" if reference else ""
    how = f"{result['engine']}, {result['dtype']}" if result.get("dtype") else "hf"
    rows: dict[str, str] = {}
    if text is not None:
        size = f"{result['chunks']} x {result['seq_len']} tokens"
        kept = f", keys and values {result['kv']}" if result.get("kv") else ""
        rows[f"text {shown_name(str(text))}, {size}{against} ({how}{kept})"] = _figures(
            result,
            (("kl_mean", "KL"), ("delta_nll", "delta NLL"), ("top1", "top-1")),
            (("nll", "NLL"), ("ppl", "perplexity")),
        )
    answers = result.get("chat")
    if chat is not None and answers:
        size = f"{answers['prompts']} prompts"
        rows[f"answers to {shown_name(str(chat))}, {size}{against} ({how})"] = _figures(
            answers, (("kl", "KL"), ("delta_nll", "delta NLL"), ("top1", "top-1")), ()
        )
    return rows


def _figures(
    result: Mapping[str, Any],
    compared: Sequence[tuple[str, str]],
    alone: Sequence[tuple[str, str]],
) -> str:
    """Figures with their standard errors; those of a model alone where none compares it."""
    known = [(key, label) for key, label in compared if result.get(key) is not None]
    parts = []
    for key, label in known or alone:
        error = result.get(f"{key}_se")
        value = f"{label} {result[key]:.4f}"
        parts.append(value if error is None else f"{value} ± {error:.4f}")
    return ", ".join(parts)


def _mean(estimate: "Estimate") -> str:
    error = "" if estimate.se is None else f" ± {estimate.se:.4f}"
    return f"{estimate.value:.4f}{error}"


def bench_rows(analysis: "Analysis", label: str) -> dict[str, str]:
    """Rows of a card: a variant's score on each task beside the reference's.

    Args:
        analysis: of a report.
        label: of the variant.
    """
    engine, original = analysis.report.settings.engine, analysis.report.models[0].model
    rows: dict[str, str] = {}
    for variant in analysis.variants:
        if variant.label != label:
            continue
        for task in variant.tasks:
            score = task.score
            what = f"task {task.task}, {score.n} items, against {shown_name(original)} ({engine})"
            rows[what] = (
                f"{task.metric} {_mean(score.variant)}, the original {_mean(score.reference)}"
            )
    return rows
