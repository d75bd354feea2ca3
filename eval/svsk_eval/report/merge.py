# SPDX-License-Identifier: Apache-2.0
"""Several files of ``svsk bench --json`` in one comparison, and variants held to a minimum."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from svsk_eval.errors import EvalError, packages_of_pages
from svsk_eval.report.analysis import Analysis, analyze, check_tasks
from svsk_eval.report.console import print_report
from svsk_eval.report.markdown import markdown_report
from svsk_eval.report.schema import BenchReport, ModelRun, TaskRun, TextScores, load_report
from svsk_offline.storage.atomic import write_text
from svsk_offline.terminal import write_json

__all__ = [
    "below_minimum",
    "compare_and_print",
    "compare_reports",
    "is_bench_report",
    "merge_reports",
    "page_writer",
]

_MUST_AGREE: Final = (
    "engine",
    "data",
    "limit",
    "seed",
    "repeats",
    "gen_kwargs",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
)
_ROUNDING: Final = 1e-12  # of a quotient: 0.99 of a score passes a minimum of 0.99
_AGAINST_REFERENCE: Final = ("delta_nll", "kl_mean", "kl_p99", "top1")


def is_bench_report(path: str | Path) -> bool:
    """Whether a file says that ``svsk bench --json`` wrote it.

    A file that cannot be read does not say so.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == "svsk-bench"


def merge_reports(paths: Sequence[str | Path]) -> tuple[BenchReport, list[str]]:
    """Put the models of several files into one report, whose reference is the first file's.

    A model that was in an earlier file (same label, same fingerprint) is taken from there.
    Different models of the same label get a number. Figures of a text that are relative to a
    reference are left out where it was another one.

    Args:
        paths: files of ``svsk bench --json``.

    Returns:
        The whole, and what a reader should know about the merging, in sentences.

    Raises:
        EvalError: there is no file; one is missing or damaged; or it was run with other settings,
            tasks or items than the first.
    """
    if not paths:
        raise EvalError("Got no file to compare: expected at least one of `svsk bench --json`.")
    first = load_report(paths[0])
    models, notes = list(first.models), []
    reports = [first, *(load_report(path) for path in paths[1:])]
    for path, report in zip(paths[1:], reports[1:], strict=True):
        notes += _check_settings(str(paths[0]), first, str(path), report)
        same_reference = report.models[0].fingerprint == first.models[0].fingerprint
        if not same_reference and any(
            any(map(_has_relative, run.text))
            or any(task.on_reference for task in run.tasks.values())
            for run in report.models
        ):
            notes.append(
                f"{path}: its KL, delta NLL, top-1 and figures on the reference's answers are"
                " against another reference and are not shown."
            )
        for run in report.models:
            check_tasks(first.models[0], run, str(path))
            earlier = next((old for old in models if _identity(old) == _identity(run)), None)
            if earlier is None:
                models.append(run if same_reference else _without_relative(run))
            elif _scores(earlier) != _scores(run):
                notes.append(
                    f"{path}: {run.label} scored differently there; the figures of the earlier file"
                    " are shown."
                )
    merged = first.model_copy(
        update={
            "models": tuple(_distinct_labels(models)),
            "command": "\n".join(dict.fromkeys(report.command for report in reports)),
            "hardware": "; ".join(dict.fromkeys(report.hardware for report in reports)),
        }
    )
    return BenchReport.model_validate(merged.model_dump()), notes


def compare_reports(paths: Sequence[str | Path]) -> Analysis:
    """Merge files by :func:`merge_reports` and compare every model with the first one's reference.

    Raises:
        EvalError: as there.
    """
    return analyze(*merge_reports(paths))


def compare_and_print(
    console: Console,
    files: Sequence[str | Path],
    json_file: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
) -> Analysis:
    """Compare files of ``svsk bench``: show the comparison, and write it where asked.

    Args:
        console: where to show it.
        files: of ``svsk bench --json``.
        json_file: for the comparisons, without the items.
        markdown: for the report as Markdown.
        html: for the report as one HTML page.

    Raises:
        EvalError: the files cannot be compared, or a package that a page needs is absent.
    """
    write_pages = page_writer(markdown, html)
    analysis = compare_reports(files)
    print_report(console, analysis)
    write_json(json_file, {"files": [str(path) for path in files], **analysis.to_json()})
    write_pages(analysis)
    return analysis


def page_writer(markdown: Path | None, html: Path | None) -> Callable[[Analysis], None]:
    """What writes a report as Markdown and as a page, where a file is given.

    The packages of pages are optional: that they are absent is told now, not after hours.

    Raises:
        EvalError: they are absent, and ``html`` is given.
    """
    if html is not None:
        with packages_of_pages():
            from svsk_eval.report.html import html_report

    def write(analysis: Analysis) -> None:
        if markdown is not None:
            write_text(markdown, markdown_report(analysis))
        if html is not None:
            write_text(html, html_report(analysis))

    return write if markdown is not None or html is not None else lambda analysis: None


def below_minimum(analysis: Analysis, minimum: float) -> list[str]:
    """Where a variant keeps less than a share of the reference's score, in words.

    The standard errors are not considered. A task on which the reference does not score above zero
    is among them: it cannot be judged.

    Args:
        analysis: the comparisons.
        minimum: share, 0.99 for 99%.
    """
    failures = []
    for variant in analysis.variants:
        for task in variant.tasks:
            recovery = task.score.recovery
            if recovery is None:
                reason = (
                    f"cannot be judged: the reference scores {task.score.reference.value:.4f} on"
                    " these items, so there is nothing to recover"
                )
            elif recovery < minimum - _ROUNDING:
                reason = f"recovery {recovery:.4f} is below {minimum:g}"
            else:
                continue
            failures.append(f"{variant.label}, {task.task}: {reason}")
    return failures


def _check_settings(
    first_path: str, first: BenchReport, path: str, report: BenchReport
) -> list[str]:
    """Refuse settings that change scores; return notes about those that may."""
    for field in _MUST_AGREE:
        ours, theirs = getattr(first.settings, field), getattr(report.settings, field)
        if ours != theirs:
            raise EvalError(
                f"{path}: was run with {field} {theirs!r}: expected {ours!r} as in {first_path}. "
                "Run `svsk bench` again with the same settings."
            )
    notes = []
    if first.settings.model_args != report.settings.model_args:
        notes.append(
            f"{path}: other model arguments than in {first_path}: {report.settings.model_args}."
        )
    ours, theirs = first.settings.versions, report.settings.versions
    changed = [
        f"{name} {theirs.get(name, 'absent')} ({ours.get(name, 'absent')})"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if changed:
        notes.append(f"{path}: other versions than in {first_path}: {', '.join(changed)}.")
    if first.hardware != report.hardware:
        notes.append(
            f"{path}: other hardware than in {first_path}: {report.hardware}."
            " Speeds cannot be compared."
        )
    return notes


def _scores(run: ModelRun) -> list[TaskRun]:
    """A model's own scores, without what is relative to a reference."""
    return [task.model_copy(update={"on_reference": None}) for task in run.tasks.values()]


def _identity(run: ModelRun) -> tuple[str, str]:
    return run.fingerprint, run.label


def _has_relative(text: TextScores) -> bool:
    return any(getattr(text, name) is not None for name in _AGAINST_REFERENCE)


def _without_relative(run: ModelRun) -> ModelRun:
    """The model without the figures that are relative to a reference."""
    dropped = {field: None for name in _AGAINST_REFERENCE for field in (name, f"{name}_se")}
    tasks = {
        name: task.model_copy(update={"on_reference": None}) for name, task in run.tasks.items()
    }
    texts = tuple(text.model_copy(update=dropped) for text in run.text)
    return run.model_copy(update={"text": texts, "tasks": tasks})


def _distinct_labels(models: Sequence[ModelRun]) -> list[ModelRun]:
    """The models, with a number after a label that an earlier one has."""
    labels = {run.label for run in models}
    seen: set[str] = set()
    renamed = []
    for run in models:
        label, number = run.label, 2
        while label in seen or (label != run.label and label in labels):
            label, number = f"{run.label} ({number})", number + 1
        seen.add(label)
        renamed.append(run.model_copy(update={"label": label}))
    return renamed
