# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval`` and ``svsk compare`` show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from svsk_eval.compare import Comparison
from svsk_eval.scoring import evaluate, silence_progress_bars

__all__ = ["evaluate_with_progress", "print_comparisons", "print_scores"]

_ROWS = (
    ("nll", "NLL, nats per token", ".5f"),
    ("ppl", "perplexity", ".4f"),
    ("ref_nll", "NLL of the reference", ".5f"),
    ("delta_nll", "delta NLL", ".5f"),
    ("kl_mean", "KL(reference || model), mean", ".5f"),
    ("kl_p99", "KL(reference || model), 99th percentile", ".4f"),
    ("top1", "top-1 agreement", ".4f"),
)

_COMPARED = (("kl", "KL", ".5f"), ("delta_nll", "delta NLL", ".5f"), ("top1", "top-1", ".4f"))

_ROUNDING = 1e-4
"""Nats per token: the same reference on another machine may differ by less, another reference differs by more."""


def evaluate_with_progress(
    console: Console,
    model: str,
    reference: str | None,
    text: Path,
    *,
    chunks: int,
    seq_len: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Run :func:`svsk_eval.scoring.evaluate` with a progress bar, show the figures, and return them JSON-ready."""
    silence_progress_bars()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("chunks", total=chunks)
        result = evaluate(
            model,
            reference,
            text,
            chunks=chunks,
            seq_len=seq_len,
            dtype=None if dtype == "auto" else dtype,
            device=None if device == "auto" else device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        ).to_json()
    print_scores(console, result)
    return result


def print_scores(console: Console, result: dict[str, Any]) -> None:
    """Show the figures of an evaluation with their standard errors over chunks."""
    table = Table("figure", "value", "standard error")
    for key, label, form in _ROWS:
        value, error = result.get(key), result.get(f"{key}_se")
        if value is not None:
            table.add_row(label, format(value, form), "" if error is None else format(error, form))
    console.print(table)
    console.print(f"{result['tokens']} tokens in {result['chunks']} chunks", highlight=False)


def print_comparisons(console: Console, baseline: str | Path, comparisons: Sequence[Comparison]) -> None:
    """Show models against a baseline: each figure, and its paired difference with standard error (se) and p-value.

    Without references there is neither KL nor top-1, and the row is NLL.
    """
    table = Table("file", "figure")
    table.columns[0].overflow = "fold"
    for heading in ("baseline", "value", "difference ± se", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for comparison in comparisons:
        rows = [row for row in _COMPARED if row[0] in comparison.metrics] or [("nll", "NLL", ".5f")]
        for key, label, form in rows:
            pair = comparison.metrics[key]
            table.add_row(
                escape(comparison.file) if key == rows[0][0] else "",
                label,
                format(pair.baseline, form),
                format(pair.value, form),
                format(pair.difference, f"+{form}") + ("" if pair.se is None else f" ± {pair.se:{form}}"),
                "" if pair.p is None else format(pair.p, ".2g"),
                end_section=key == rows[-1][0],
            )
    console.print(table)
    console.print(f"baseline: {baseline}", highlight=False, markup=False)
    for comparison in comparisons:
        if comparison.reference_gap is not None and comparison.reference_gap > _ROUNDING:
            console.print(
                f"note: the references of {baseline} and {comparison.file} differ by up to "
                f"{comparison.reference_gap:.2g} nats per token: is it another model or dtype? If so, KL and top-1 "
                "cannot be compared.",
                highlight=False,
                markup=False,
            )
