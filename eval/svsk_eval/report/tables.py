# SPDX-License-Identifier: Apache-2.0
"""Tables and texts of a report, which console, Markdown and HTML each draw in their own way."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from svsk_eval.report.analysis import Analysis, TaskComparison
from svsk_eval.report.on_reference import on_reference
from svsk_eval.report.paired_statistics import Estimate, Interval, Paired
from svsk_eval.report.schema import ModelRun, TextScores

__all__ = [
    "DASH",
    "HOW_TO_READ",
    "METHODS",
    "SIGNIFICANT",
    "Column",
    "Strong",
    "Table",
    "all_tables",
    "data_in_words",
    "headline_text",
    "percent",
    "plus_minus",
    "run_facts",
    "size_in_words",
]

DASH: Final = "\N{EN DASH}"
"""Stands for a figure that there is none of."""

SIGNIFICANT: Final = 0.05

METHODS: Final = (
    (
        "± is the standard error over items. Brackets hold 95% confidence intervals of paired"
        " differences, variant minus reference, on the same items."
    ),
    (
        "Scores that are all 0 or 1: Bonett-Price interval (2012) and McNemar's mid-p test"
        " (Fagerland et al. 2013, 2014). Other figures: BCa bootstrap of the mean difference and a"
        " sign-flip permutation test."
    ),
    "Over all tasks: every task has the same weight; stratified bootstrap over items.",
    (
        "Detectable is the smallest true difference that as many items would show, p below 0.05"
        " and not adjusted, in 80% of cases, if the two models differ as much from item to item as"
        " these do. A smaller one may be there unseen."
    ),
    (
        "Holm p is adjusted for all variants and tasks of the table. Bold marks differences whose"
        " Holm p is below 0.05; over all tasks, whose p is."
    ),
    (
        "Recovery is the variant's score divided by the reference's. Lost and gained count the"
        " items on which the variant scores lower and higher."
    ),
)

HOW_TO_READ: Final = (
    (
        "An interval that contains zero is no evidence that the models are equal: it holds every"
        " difference that these items cannot rule out. What matters is how far it reaches."
    ),
    (
        "Where scores tie, look at lost and gained. A variant that loses 40 items and gains 40"
        " others has the same score as the reference, but it is not the same model."
    ),
    (
        "The column beside a difference says which one these items would have shown: with 100 items"
        ' of which 10 flip, 9 points. Where that is more than you could live with, "no difference"'
        " says nothing, and more items, or several answers to each (--repeats), are needed."
    ),
    (
        "The figures hold for this engine, prompt format, data and version of each task. Scores"
        " that others report for a task of the same name may have been measured in another way."
    ),
    (
        "An answer that reaches the limit of tokens is usually scored as wrong. If fewer answers"
        " end by themselves, or they become longer, part of a difference may come from that limit."
    ),
)


class Strong(str):
    """A cell that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """Heading of a column; ``numeric`` ones are aligned to the right."""

    heading: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Cells in words.

    Attributes:
        title: its heading.
        note: a sentence below the heading, or nothing.
        columns: their headings.
        groups: rows that belong together, one cell per column.
    """

    title: str
    note: str
    columns: tuple[Column, ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]


def all_tables(analysis: Analysis) -> list[Table]:
    """The tables of a report in their order, without those that would be empty."""
    tables = [_summary(analysis)]
    if analysis.variants:
        tables.append(_over_tasks(analysis))
    tables += [_tasks(analysis), _per_task(analysis)]
    if any(task.output_tokens for tasks in analysis.estimates.values() for task in tasks.values()):
        tables.append(_answers(analysis))
    if any(task.on_reference for run in analysis.report.models for task in run.tasks.values()):
        tables.append(_on_reference(analysis))
    if any(task.by_repeats for variant in analysis.variants for task in variant.tasks):
        tables.append(_repeats(analysis))
    if any(run.text for run in analysis.report.models):
        tables.append(_text(analysis))
    return tables


def run_facts(analysis: Analysis) -> list[tuple[str, str]]:
    """What was run, how and where: names and values. The command line is left to the caller."""
    report, settings = analysis.report, analysis.report.settings
    template = "no"
    if settings.apply_chat_template:
        template = "yes, examples as turns" if settings.fewshot_as_multiturn else "yes"
    return [
        ("Created", report.created),
        ("Hardware", report.hardware),
        ("Reference", analysis.reference.label),
        ("Engine", settings.engine),
        ("Tasks", ", ".join(settings.tasks)),
        ("Data", data_in_words(analysis)),
        ("Items per task", "all" if settings.limit is None else f"the first {settings.limit}"),
        ("Chat template", template),
        (
            "System message",
            DASH if settings.system_instruction is None else settings.system_instruction,
        ),
        ("Seed", str(settings.seed)),
        ("Answers to each item", str(settings.repeats)),
        ("Generation settings", _pairs(settings.gen_kwargs)),
        ("Model arguments", _pairs(settings.model_args)),
        ("Versions", _pairs(settings.versions, " ")),
    ]


def data_in_words(analysis: Analysis) -> str:
    """Where the items came from."""
    return {"hub": "datasets of the Hugging Face hub", "local": "local files (SVSK_DATA)"}[
        analysis.report.settings.data
    ]


def _summary(analysis: Analysis) -> Table:
    pooled = {variant.label: variant.pooled for variant in analysis.variants}
    rows = []
    for run in analysis.report.models:
        scores = [task.score.value for task in analysis.estimates[run.label].values()]
        text = headline_text(run)
        over = pooled.get(run.label)
        rows.append(
            (
                run.label if over else f"{run.label} (reference)",
                run.method,
                _number(run.bpw, ".2f"),
                size_in_words(run.size_bytes),
                run.dtype,
                _number(sum(scores) / len(scores), ".4f"),
                percent(over.recovery if over else None),
                plus_minus(text.kl_mean, text.kl_mean_se, ".4f") if text else DASH,
                plus_minus(text.nll, text.nll_se, ".4f") if text else DASH,
                _speed(run),
            )
        )
    headings = (
        "bits per weight",
        "size",
        "dtype",
        "mean score",
        "recovery",
        "KL",
        "NLL",
        "tokens/s",
    )
    note = (
        "Mean score and recovery: over tasks. KL and NLL: nats per token."
        " Speed: of generating tasks."
    )
    return _table("Summary", ("model", "method"), headings, [[row] for row in rows], note)


def _over_tasks(analysis: Analysis) -> Table:
    rows = []
    for variant in analysis.variants:
        over = variant.pooled
        recovery = percent(over.recovery)
        if over.recovery_interval:
            recovery += (
                f" [{percent(over.recovery_interval.low)}, {percent(over.recovery_interval.high)}]"
            )
        difference = _difference(over.difference, over.interval, "+.4f")
        rows.append(
            (
                variant.label,
                str(over.tasks),
                f"{over.reference:.4f}",
                f"{over.variant:.4f}",
                Strong(difference) if over.p < SIGNIFICANT else difference,
                _number(over.detectable, ".4f"),
                _p(over.p),
                recovery,
            )
        )
    headings = (
        "tasks",
        "reference",
        "variant",
        "mean difference [95%]",
        "detectable",
        "p",
        "mean recovery [95%]",
    )
    return _table("Over all tasks", ("variant",), headings, [[row] for row in rows])


def _tasks(analysis: Analysis) -> Table:
    rows = []
    for name, run in analysis.reference.tasks.items():
        shots, items = str(run.num_fewshot), str(len(run.doc_ids))
        rows.append([(name, run.primary, run.output_type, run.version, shots, items)])
    headings = ("version", "examples in the prompt", "items")
    return _table("Tasks", ("task", "metric", "type"), headings, rows)


def _per_task(analysis: Analysis) -> Table:
    groups = []
    for task, run in analysis.reference.tasks.items():
        shown = analysis.estimates[analysis.reference.label][task].score
        name = f"{task} · n = {len(run.doc_ids)}"
        rows = [
            (name, analysis.reference.label, plus_minus(shown.value, shown.se, ".4f"), *[DASH] * 7)
        ]
        for label, pair in _of_task(analysis, task):
            score = pair.score
            difference = _difference(score.difference, score.interval, "+.4f")
            rows.append(
                (
                    name,
                    label,
                    plus_minus(score.variant.value, score.variant.se, ".4f"),
                    Strong(difference) if pair.p_holm < SIGNIFICANT else difference,
                    _number(score.detectable, ".4f"),
                    percent(score.recovery),
                    str(score.lost),
                    str(score.gained),
                    _p(score.p),
                    _p(pair.p_holm),
                )
            )
        groups.append(rows)
    headings = (
        "score ± se",
        "difference [95%]",
        "detectable",
        "recovery",
        "lost",
        "gained",
        "p",
        "Holm p",
    )
    return _table("Scores", ("task", "model"), headings, groups)


def _answers(analysis: Analysis) -> Table:
    groups = []
    for task in analysis.tasks:
        shown = analysis.estimates[analysis.reference.label][task]
        ended, tokens = _rate(shown.terminated), _tokens(shown.output_tokens)
        none = (DASH,) * 3
        rows = [(task, analysis.reference.label, ended, *none, tokens, *none)]
        for label, pair in _of_task(analysis, task):
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
    return _table("Answers", ("task", "model"), headings, groups, note)


def _on_reference(analysis: Analysis) -> Table:
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
                _mean(figures.kl, ".4f"),
                _mean(figures.delta_nll, "+.4f"),
                _mean(figures.flips, ".2f", 100),
                percent(figures.never_flips),
                _number(figures.half_flip_by, ".0f"),
                _mean(figures.ends_there, ".4f"),
                _mean(figures.reference_ends_there, ".4f"),
            )
            groups.setdefault(name, []).append(row)
    headings = (
        "answers",
        "tokens",
        "KL ± se",
        "delta NLL ± se",
        "% of tokens that flip ± se",
        "answers without a flip",
        "half have flipped after",
        "ends there ± se",
        "reference ends there ± se",
    )
    note = (
        "Both models read the reference's own answers, with transformers; se over answers. A token"
        " flips where the likeliest ones of the two differ: from the first flip on, greedy answers"
        " go apart. Ends there: probability of ending where the reference did."
    )
    return _table(
        "On the reference's answers", ("task", "model"), headings, [*groups.values()], note
    )


def _mean(mean: Estimate | None, form: str, scale: float = 1.0) -> str:
    if mean is None:
        return DASH
    return plus_minus(scale * mean.value, None if mean.se is None else scale * mean.se, form)


def _repeats(analysis: Analysis) -> Table:
    """Whether more answers to each item would help, or only more items."""
    groups = []
    for task, run in analysis.reference.tasks.items():
        rows = [
            (
                task,
                label,
                str(run.repeats),
                *(_number(value, ".4f") for value in (one, pair.score.detectable, any_number)),
            )
            for label, pair in _of_task(analysis, task)
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
    return _table("Several answers", ("task", "model"), headings, groups, note)


def _text(analysis: Analysis) -> Table:
    """Figures of texts: a group for each text and engine."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for run in analysis.report.models:
        for text in run.text:
            cut = f"{text.tokens} tokens, {text.chunks} x {text.seq_len}"
            name = f"{text.engine} · {cut} · text {text.text_fingerprint[:8]}"
            row = (
                name,
                run.label,
                plus_minus(text.nll, text.nll_se, ".4f"),
                _number(math.exp(text.nll), ".3f"),
                plus_minus(text.delta_nll, text.delta_nll_se, "+.4f"),
                plus_minus(text.kl_mean, text.kl_mean_se, ".4f"),
                plus_minus(text.kl_p99, text.kl_p99_se, ".3f"),
                plus_minus(text.top1, text.top1_se, ".4f"),
            )
            groups.setdefault(name, []).append(row)
    headings = (
        "NLL ± se",
        "perplexity",
        "delta NLL ± se",
        "KL ± se",
        "KL, 99th percentile ± se",
        "top-1 ± se",
    )
    note = (
        "Nats per token; KL is KL(reference || model); se over chunks. vllm: the served model; hf:"
        " its dequantised weights."
    )
    return _table("Text", ("engine and text", "model"), headings, [*groups.values()], note)


def _table(
    title: str,
    words: Sequence[str],
    numbers: Sequence[str],
    groups: Sequence[Sequence[tuple[str, ...]]],
    note: str = "",
) -> Table:
    """A table whose first columns hold words and whose others hold numbers."""
    columns = (*(Column(heading, False) for heading in words), *map(Column, numbers))
    return Table(title, note, columns, tuple(map(tuple, groups)))


def _of_task(analysis: Analysis, task: str) -> Iterator[tuple[str, TaskComparison]]:
    for variant in analysis.variants:
        yield variant.label, next(pair for pair in variant.tasks if pair.task == task)


def headline_text(run: ModelRun) -> TextScores | None:
    """The first text with a KL, else the first."""
    return next(
        (text for text in run.text if text.kl_mean is not None), run.text[0] if run.text else None
    )


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share in percent, or a dash."""
    return DASH if value is None else f"{100 * value:.1f}%"


def plus_minus(value: float | None, se: float | None, form: str) -> str:
    """A figure and its standard error in a format, or a dash."""
    if value is None:
        return DASH
    return format(value, form) + ("" if se is None else f" ± {se:{form.lstrip('+')}}")


def _difference(value: float, interval: Interval | None, form: str, scale: float = 1.0) -> str:
    limits = (
        f" [{scale * interval.low:{form}}, {scale * interval.high:{form}}]"
        if interval
        else f" [{DASH}]"
    )
    return f"{scale * value:{form}}{limits}"


def _pair(pair: Paired | None, scale: float, form: str) -> tuple[str, str, str]:
    """Difference, detectable difference and p-value."""
    if pair is None:
        return DASH, DASH, DASH
    detectable = None if pair.detectable is None else scale * pair.detectable
    return (
        _difference(pair.difference, pair.interval, form, scale),
        _number(detectable, form.lstrip("+")),
        _p(pair.p),
    )


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _rate(share: Estimate | None) -> str:
    return percent(None if share is None else share.value)


def _tokens(mean: Estimate | None) -> str:
    return DASH if mean is None else plus_minus(mean.value, mean.se, ".1f")


def size_in_words(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _speed(run: ModelRun) -> str:
    timed = run.generation
    if timed is None or timed.seconds <= 0:
        return DASH
    speed = timed.tokens / timed.seconds
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"


def _pairs(values: Mapping[str, object], join: str = " = ") -> str:
    return ", ".join(f"{name}{join}{value}" for name, value in values.items()) or DASH
