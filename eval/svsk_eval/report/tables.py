# SPDX-License-Identifier: Apache-2.0
"""Tables and texts of a report, which console, Markdown and HTML each draw in their own way."""

import math
from collections.abc import Mapping
from typing import Final

from svsk_eval.report.analysis import Analysis
from svsk_eval.report.answer_tables import answers, on_reference_answers, several_answers
from svsk_eval.report.cells import (
    DASH,
    Strong,
    Table,
    difference,
    make_table,
    number,
    p_value,
    percent,
    plus_minus,
    size_in_words,
)
from svsk_eval.report.schema import ModelRun, TextScores

__all__ = [
    "HOW_TO_READ",
    "METHODS",
    "SIGNIFICANT",
    "all_tables",
    "data_in_words",
    "headline_text",
    "run_facts",
]

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


def all_tables(analysis: Analysis) -> list[Table]:
    """The tables of a report in their order, without those that would be empty."""
    tables = [_summary(analysis)]
    if analysis.variants:
        tables.append(_over_tasks(analysis))
    tables += [_tasks(analysis), _per_task(analysis)]
    if any(task.output_tokens for tasks in analysis.estimates.values() for task in tasks.values()):
        tables.append(answers(analysis))
    if any(task.on_reference for run in analysis.report.models for task in run.tasks.values()):
        tables.append(on_reference_answers(analysis))
    if any(task.by_repeats for variant in analysis.variants for task in variant.tasks):
        tables.append(several_answers(analysis))
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
                number(run.bpw, ".2f"),
                size_in_words(run.size_bytes),
                run.dtype,
                number(sum(scores) / len(scores), ".4f"),
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
    return make_table("Summary", ("model", "method"), headings, [[row] for row in rows], note)


def _over_tasks(analysis: Analysis) -> Table:
    rows = []
    for variant in analysis.variants:
        over = variant.pooled
        recovery = percent(over.recovery)
        if over.recovery_interval:
            recovery += (
                f" [{percent(over.recovery_interval.low)}, {percent(over.recovery_interval.high)}]"
            )
        change = difference(over.difference, over.interval, "+.4f")
        rows.append(
            (
                variant.label,
                str(over.tasks),
                f"{over.reference:.4f}",
                f"{over.variant:.4f}",
                Strong(change) if over.p < SIGNIFICANT else change,
                number(over.detectable, ".4f"),
                p_value(over.p),
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
    return make_table("Over all tasks", ("variant",), headings, [[row] for row in rows])


def _tasks(analysis: Analysis) -> Table:
    rows = []
    for name, run in analysis.reference.tasks.items():
        shots, items = str(run.num_fewshot), str(len(run.doc_ids))
        rows.append([(name, run.primary, run.output_type, run.version, shots, items)])
    headings = ("version", "examples in the prompt", "items")
    return make_table("Tasks", ("task", "metric", "type"), headings, rows)


def _per_task(analysis: Analysis) -> Table:
    groups = []
    for task, run in analysis.reference.tasks.items():
        shown = analysis.estimates[analysis.reference.label][task].score
        name = f"{task} · n = {len(run.doc_ids)}"
        rows = [
            (name, analysis.reference.label, plus_minus(shown.value, shown.se, ".4f"), *[DASH] * 7)
        ]
        for label, pair in analysis.of_task(task):
            score = pair.score
            change = difference(score.difference, score.interval, "+.4f")
            rows.append(
                (
                    name,
                    label,
                    plus_minus(score.variant.value, score.variant.se, ".4f"),
                    Strong(change) if pair.p_holm < SIGNIFICANT else change,
                    number(score.detectable, ".4f"),
                    percent(score.recovery),
                    str(score.lost),
                    str(score.gained),
                    p_value(score.p),
                    p_value(pair.p_holm),
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
    return make_table("Scores", ("task", "model"), headings, groups)


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
                number(math.exp(text.nll), ".3f"),
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
    return make_table("Text", ("engine and text", "model"), headings, [*groups.values()], note)


def headline_text(run: ModelRun) -> TextScores | None:
    """The first text with a KL, else the first."""
    return next(
        (text for text in run.text if text.kl_mean is not None), run.text[0] if run.text else None
    )


def _speed(run: ModelRun) -> str:
    timed = run.generation
    if timed is None or timed.seconds <= 0:
        return DASH
    speed = timed.tokens / timed.seconds
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"


def _pairs(values: Mapping[str, object], join: str = " = ") -> str:
    return ", ".join(f"{name}{join}{value}" for name, value in values.items()) or DASH
