# SPDX-License-Identifier: Apache-2.0
"""What ``svsk tune`` shows."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from svsk_eval.text.models import silence_progress_bars
from svsk_eval.tune.search import Step
from svsk_eval.tune.trials import Score, Trial, differences, pareto_front
from svsk_eval.tune.tune import TuneProgress, TuneResult, tune
from svsk_offline.recipe import Recipe

__all__ = ["print_trials", "tune_with_progress", "tuned_figures"]

_VERDICTS: Final = {
    "first": "to beat",
    "better": "new best",
    "noise": "lower, but within the noise",
    "worse": "not better",
    "over": "larger than the target",
}


def tune_with_progress(
    console: Console,
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    budget_minutes: float,
    notes: Console | None = None,
    **options: Any,
) -> TuneResult:
    """Run :func:`svsk_eval.tune.tune.tune` with a bar and a line per trial; show all at the end.

    Args:
        console: where to.
        model: folder or hub name.
        out: recipe file to write.
        recipe: where to start.
        budget_minutes: of all runs of the search together.
        notes: where the bar and the lines of trials are shown; ``console`` if None.
        options: further ones of ``tune``.
    """
    silence_progress_bars()
    notes = notes or console
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def start(number: int, trial: Recipe) -> None:
            changed = _changes(differences(trial, recipe))
            bar.reset(task, total=None, description=escape(f"trial {number}: {changed}"))

        def step(done: Step) -> None:
            notes.print(_line(done, recipe, budget_minutes), markup=False)

        callbacks = TuneProgress(
            message=lambda text: notes.print(text, markup=False),
            start=start,
            block=lambda index, total: bar.update(task, completed=index, total=total),
            step=step,
        )
        result = tune(
            model, out, recipe, budget_minutes=budget_minutes, progress=callbacks, **options
        )
    print_trials(console, result)
    return result


def tuned_figures(result: TuneResult) -> dict[str, Any]:
    """What a search found, JSON-ready: every trial with what it changed, its score or its error."""

    def figures(trial: Trial) -> dict[str, Any]:
        return {
            "changed": dict(differences(trial.recipe, result.default.recipe)),
            "score": None if trial.score is None else asdict(trial.score),
            "error": trial.error,
        }

    return {
        "out": str(result.out),
        "chosen": figures(result.chosen),
        "trials": [figures(trial) for trial in result.trials],
        "seconds": result.seconds,
        "converged": result.converged,
    }


def print_trials(console: Console, result: TuneResult) -> None:
    """Show all trials by their KL, those that failed below, and why the search ended."""
    scored = [(trial, trial.score) for trial in result.trials if trial.score is not None]
    front = dict(
        zip(
            (trial.recipe.digest for trial, _ in scored),
            pareto_front([s for _, s in scored]),
            strict=True,
        )
    )
    table = Table("", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("bpw", "KL ± se", "dNLL", "top-1", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("changed", overflow="fold")
    for trial, score in sorted(scored, key=lambda item: item[1].kl):
        chosen = trial.recipe.digest == result.chosen.recipe.digest
        marks = ("→" if chosen else " ") + ("*" if front[trial.recipe.digest] else " ")
        changed = escape(_changes(differences(trial.recipe, result.default.recipe), "\n"))
        table.add_row(marks, *_cells(score), changed, style="bold" if chosen else None)
    console.print(table)
    console.print(
        "→ chosen (a KL lower by less than the noise is"
        " not)   * no trial beats it in both bpw and KL"
    )
    for trial in result.trials:
        if trial.error is not None:
            changed = _changes(differences(trial.recipe, result.default.recipe))
            console.print(f"failed: {changed}: {trial.error}", markup=False)
    console.print(_summary(result), markup=False)


def _summary(result: TuneResult) -> str:
    best, default = result.chosen.score, result.default.score
    assert best is not None, "it was chosen by its score"
    assert default is not None, "the search ends where it fails"
    reason = (
        "a sweep over all parameters brought nothing more"
        if result.converged
        else "the budget is spent"
    )
    return (
        f"{len(result.trials)} trials in {result.seconds / 60:.1f} min; {reason}; {result.refused}"
        f" value(s) left out that the recipe's rules refuse\nwrote {result.out}: held-out KL"
        f" {best.kl:.5f} ± {best.kl_se:.5f}, with {result.default.recipe.name} {default.kl:.5f} ±"
        f" {default.kl_se:.5f}"
    )


def _line(step: Step, default: Recipe, budget_minutes: float) -> str:
    """One line about a trial that was run."""
    head = f"trial {step.number:>3}  {_changes(differences(step.trial.recipe, default))}: "
    spent = f"{step.spent / 60:.1f} of {budget_minutes:g} min"
    score = step.trial.score
    if score is None:
        return f"{head}failed, {spent}: {step.trial.error}"
    verdict = _VERDICTS[step.verdict]
    if step.difference is not None:
        verdict += f" ({step.difference:+.5f} ± {step.se:.5f})"
    return (
        f"{head}{score.bits_per_weight:.4f} bpw, KL"
        f" {score.kl:.5f} ± {score.kl_se:.5f}, {verdict}, {spent}"
    )


def _cells(score: Score) -> tuple[str, ...]:
    return (
        f"{score.bits_per_weight:.4f}",
        f"{score.kl:.5f} ± {score.kl_se:.5f}",
        f"{score.delta_nll:+.4f}",
        f"{score.top1:.1%}",
        f"{score.seconds:.1f}",
    )


def _changes(changed: Mapping[str, Any], separator: str = ", ") -> str:
    return separator.join(f"{key} {value}" for key, value in changed.items()) or "default"
