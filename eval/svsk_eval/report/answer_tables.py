# SPDX-License-Identifier: Apache-2.0
"""Tables of a report that are about answers: ends, lengths, tokens, several to an item."""

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.cells import (
    DASH,
    Table,
    difference,
    make_table,
    mean_with_se,
    number,
    p_value,
    percent,
    plus_minus,
)
from svsk_eval.report.on_reference import on_reference
from svsk_eval.report.paired_statistics import Estimate, Paired

__all__ = ["answers", "on_reference_answers", "several_answers"]


def answers(analysis: Analysis) -> Table:
    """How many answers ended by themselves, and how long they are."""
    groups = []
    for task in analysis.tasks:
        shown = analysis.estimates[analysis.reference.label][task]
        ended, tokens = _rate(shown.terminated), _tokens(shown.output_tokens)
        none = (DASH,) * 3
        rows = [(task, analysis.reference.label, ended, *none, tokens, *none)]
        for label, pair in analysis.of_task(task):
            estimates = analysis.estimates[label][task]
            rows.append(
                (
                    task,
                    label,
                    _rate(estimates.terminated),
                    *_pair(pair.terminated, 100, "+.1f"),
                    _tokens(estimates.output_tokens),
                    *_pair(pair.output_tokens, 1, "+.1f"),
                )
            )
        if any(cell != DASH for row in rows for cell in row[2:]):
            groups.append(rows)
    headings = (
        "ended by themselves",
        "difference [95%], points",
        "detectable",
        "p",
        "mean tokens ± se",
        "difference [95%]",
        "detectable",
        "p",
    )
    note = (
        "Answers that ended by themselves and not at the limit of tokens, and their length. p is"
        " not adjusted."
    )
    return make_table("Answers", ("task", "model"), headings, groups, note)


def on_reference_answers(analysis: Analysis) -> Table:
    """Variants on the reference's own answers, token by token: a group for each set of answers."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for task in analysis.tasks:
        for run in analysis.report.models:
            if (scored := run.tasks[task].on_reference) is None:
                continue
            name = f"{task} · answers {scored.answers_fingerprint[:8]}"
            figures = on_reference(scored)
            row = (
                name,
                run.label,
                str(figures.answers),
                str(figures.tokens),
                mean_with_se(figures.kl, ".4f"),
                mean_with_se(figures.delta_nll, "+.4f"),
                mean_with_se(figures.flips, ".2f", 100),
                percent(figures.never_flips),
                number(figures.half_flip_by, ".0f"),
                mean_with_se(figures.ends_there, ".4f"),
                mean_with_se(figures.reference_ends_there, ".4f"),
            )
            groups.setdefault(name, []).append(row)
    headings = (
        "answers",
        "tokens",
        "KL ± se",
        "delta NLL ± se",
        "flips, % ± se",
        "no flip",
        "half flip by",
        "ends there ± se",
        "reference ± se",
    )
    note = (
        "Both models read the reference's own answers, with transformers; se over answers. Flips:"
        " tokens at which the likeliest ones of the two differ; from the first on, greedy answers"
        " go apart. No flip: share of the answers; half flip by: median token of the first. Ends"
        " there: probability of ending where the reference did, and the reference's own."
    )
    return make_table(
        "On the reference's answers", ("task", "model"), headings, [*groups.values()], note
    )


def several_answers(analysis: Analysis) -> Table:
    """Whether more answers to each item would help, or only more items."""
    groups = []
    for task, run in analysis.reference.tasks.items():
        rows = [
            (
                task,
                label,
                str(run.repeats),
                *(number(value, ".4f") for value in (one, pair.score.detectable, any_number)),
            )
            for label, pair in analysis.of_task(task)
            if pair.by_repeats
            for one, any_number in (pair.by_repeats,)
        ]
        if rows:
            groups.append(rows)
    headings = (
        "answers to each item",
        "detectable with one",
        "detectable",
        "with any number",
    )
    note = (
        "Several answers to an item average out the luck of drawing, not the choice of items. Where"
        " the last column is little below the one before, only more items help."
    )
    return make_table("Several answers", ("task", "model"), headings, groups, note)


def _pair(pair: Paired | None, scale: float, form: str) -> tuple[str, str, str]:
    """Difference, detectable difference and p-value."""
    if pair is None:
        return DASH, DASH, DASH
    detectable = None if pair.detectable is None else scale * pair.detectable
    return (
        difference(pair.difference, pair.interval, form, scale),
        number(detectable, form.lstrip("+")),
        p_value(pair.p),
    )


def _rate(share: Estimate | None) -> str:
    return percent(None if share is None else share.value)


def _tokens(mean: Estimate | None) -> str:
    return DASH if mean is None else plus_minus(mean.value, mean.se, ".1f")
