# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval`` shows."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from svsk_eval.scoring import evaluate, silence_progress_bars

__all__ = ["evaluate_with_progress", "print_scores"]

_ROWS = (
    ("nll", "NLL, nats per token", ".5f"),
    ("ppl", "perplexity", ".4f"),
    ("ref_nll", "NLL of the reference", ".5f"),
    ("delta_nll", "delta NLL", ".5f"),
    ("kl_mean", "KL(reference || model), mean", ".5f"),
    ("kl_p99", "KL(reference || model), 99th percentile", ".4f"),
    ("top1", "top-1 agreement", ".4f"),
)


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
