# SPDX-License-Identifier: Apache-2.0
"""What ``svsk eval`` and ``svsk compare`` show."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from svsk_eval.text.compare import Comparison
from svsk_offline.console_tables import new_table, show_table
from svsk_offline.terminal import steps

if TYPE_CHECKING:
    from svsk_eval.text.request import TextRequest
    from svsk_eval.text.scoring import EachChunk

__all__ = ["COMPARED", "evaluate_with_progress", "print_comparisons", "print_scores"]

_ROWS = (
    ("nll", "NLL, nats per token", ".5f"),
    ("ppl", "perplexity", ".4f"),
    ("ref_nll", "NLL of the reference", ".5f"),
    ("delta_nll", "delta NLL", ".5f"),
    ("kl_mean", "KL(reference || model), mean", ".5f"),
    ("kl_p99", "KL(reference || model), 99th percentile", ".4f"),
    ("top1", "top-1 agreement", ".4f"),
)

COMPARED = (("kl", "KL", ".5f"), ("delta_nll", "delta NLL", ".5f"), ("top1", "top-1", ".4f"))
"""Figures that models are compared by: their key, what they are called, and their format."""

_ROUNDING = 1e-4
"""Nats per token.

The same reference on another machine may differ by less, another reference differs by more.
"""


def evaluate_with_progress(
    console: Console,
    request: "TextRequest",
    notes: Console | None = None,
    each: "EachChunk | None" = None,
) -> dict[str, Any]:
    """Score a model with a progress bar, show the figures, and return them JSON-ready.

    Args:
        console: where the figures are shown.
        request: what is scored.
        notes: where progress is shown; ``console`` if None.
        each: given every chunk's tokens and scores; with ``hf`` only.

    Raises:
        EvalError: see :func:`svsk_eval.text.request.score`.
    """
    from svsk_eval.text.models import silence_progress_bars  # torch, which comparing does not need
    from svsk_eval.text.request import score

    silence_progress_bars()
    with steps(notes or console, "chunks", transient=True) as bar:

        def show(done: int, total: int) -> None:
            # the served models come one after the other
            starting = request.engine == "vllm" and done % request.chunks == 0 and done < total
            bar.update("vLLM starts, chunks" if starting else "chunks", done, total)

        scores = score(request, show, each).to_json()
    print_scores(console, scores)
    return scores


def print_scores(console: Console, result: dict[str, Any]) -> None:
    """Show the figures of an evaluation with their standard errors over chunks."""
    table = new_table("figure", "value", "standard error", numbers=(1, 2))
    for key, label, form in _ROWS:
        value, error = result.get(key), result.get(f"{key}_se")
        if value is not None:
            table.add_row(label, format(value, form), "" if error is None else format(error, form))
    show_table(console, table)
    console.print(f"{result['tokens']} tokens in {result['chunks']} chunks")
    if result.get("kv") is not None:
        keys, values = result["kv"].split(":")
        console.print(f"the model attended to stored keys ({keys}) and values ({values})")
    if (kind := result.get("activations")) is not None:
        from svsk_eval.text.activations import ACTIVATIONS  # torch, as above

        meaning = ACTIVATIONS[kind].meaning
        console.print(f"the model's linears read rounded inputs, {kind}: {meaning}", markup=False)
    settings = result.get("engine_settings")
    if settings is not None:
        used = f"served by vLLM {settings['vllm']} on {settings['device']} in {result['dtype']}"
        kernels = settings.get("svsk_kernels")
        console.print(
            f"{used}; SVSK kernels: {', '.join(kernels)}" if kernels else used, markup=False
        )
    if result.get("ref_nll") is not None and result.get("kl_mean") is None:
        console.print("KL: none, vLLM does not give whole distributions; --engine hf does")


def print_comparisons(
    console: Console,
    baseline: str | Path,
    comparisons: Sequence[Comparison],
    figures: Sequence[tuple[str, str, str]] = COMPARED,
) -> None:
    """Show models against a baseline.

    Each figure, and its paired difference with standard error (se) and p-value.

    Without references there is neither KL nor top-1, and the row is NLL; it is a row too where the
    engines differ.
    """
    table = new_table("file", "figure")
    for heading in ("baseline", "value", "difference ± se", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for comparison in comparisons:
        rows = [row for row in figures if row[0] in comparison.metrics]
        if not rows or comparison.engines is not None:
            rows.insert(0, ("nll", "NLL", ".5f"))
        for key, label, form in rows:
            pair = comparison.metrics[key]
            table.add_row(
                escape(comparison.file) if key == rows[0][0] else "",
                label,
                format(pair.baseline, form),
                format(pair.value, form),
                format(pair.difference, f"+{form}")
                + ("" if pair.se is None else f" ± {pair.se:{form}}"),
                "" if pair.p is None else format(pair.p, ".2g"),
                end_section=key == rows[-1][0],
            )
    show_table(console, table)
    console.print(f"baseline: {baseline}", markup=False)
    for comparison in comparisons:
        if comparison.rounding is not None:
            ours, theirs = comparison.rounding
            console.print(
                f"note: rounded besides the weights: {ours} in {baseline}, {theirs} in"
                f" {comparison.file}.",
                markup=False,
            )
        if comparison.engines is not None:
            ours, theirs = comparison.engines
            console.print(
                f"note: {baseline} was scored with {ours}, {comparison.file} with {theirs}: the"
                " differences are also those of the engines' arithmetic.",
                markup=False,
            )
        elif comparison.reference_gap is not None and comparison.reference_gap > _ROUNDING:
            console.print(
                f"note: the references of {baseline} and {comparison.file} differ by up to"
                f" {comparison.reference_gap:.2g} nats per token: is it another model or dtype? If"
                " so, KL and top-1 cannot be compared.",
                markup=False,
            )
