# SPDX-License-Identifier: Apache-2.0
"""All paired comparisons of one report.

Every variant against the reference, task by task and over all tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from svsk_eval.errors import EvalError
from svsk_eval.report.detectable import detectable_by_repeats
from svsk_eval.report.paired_statistics import (
    RESAMPLES,
    Estimate,
    Paired,
    estimate,
    holm,
    is_binary,
    paired,
)
from svsk_eval.report.pooling import Pooled, pooled
from svsk_eval.report.schema import BenchReport, ModelRun, TaskRun

__all__ = [
    "Analysis",
    "TaskComparison",
    "TaskEstimates",
    "VariantComparison",
    "analyze",
    "check_tasks",
]

FloatArray = npt.NDArray[np.float64]

_COMMON: Final = ("version", "num_fewshot", "output_type", "primary", "repeats")
_FIGURES: Final = ("score", "terminated", "output_tokens")
_SHOWN_ITEMS: Final = 3
_SHOWN_HASH: Final = 12
_CAUSES: Final = (
    "What can cause it: another chat template or tokenizer in one of the two folders (compare"
    " chat_template.jinja, tokenizer_config.json and tokenizer.json), other data, or another"
    " --seed, which draws the examples of the prompts."
)
_AGAIN: Final = "Run `svsk bench` on both models again with the same settings, data and versions."


@dataclass(frozen=True)
class TaskEstimates:
    """One model on one task.

    Attributes:
        score: mean of the primary metric.
        terminated: share of answers that ended by themselves; None for a task without generation.
        output_tokens: mean length of an answer, tokens; None for a task without generation.
    """

    score: Estimate
    terminated: Estimate | None
    output_tokens: Estimate | None


@dataclass(frozen=True)
class TaskComparison:
    """One variant against the reference on one task.

    Attributes:
        task: its name.
        metric: the primary metric, as in the report.
        score: the difference of the primary metric.
        p_holm: its p-value, adjusted by Holm's method over all variants and tasks of the report.
        terminated: the difference of the shares of answers that ended by themselves; None where
            either has none.
        output_tokens: the difference of the answers' lengths, tokens; None where either has none.
        by_repeats: the detectable difference with one answer to each item, and with any number;
            None where one was drawn.
    """

    task: str
    metric: str
    score: Paired
    p_holm: float
    terminated: Paired | None
    output_tokens: Paired | None
    by_repeats: tuple[float, float] | None


@dataclass(frozen=True)
class VariantComparison:
    """One variant against the reference on all tasks, in the reference's order, and over them."""

    label: str
    tasks: tuple[TaskComparison, ...]
    pooled: Pooled


@dataclass(frozen=True)
class Analysis:
    """A report and what follows from it.

    Attributes:
        report: what was measured.
        estimates: per label and task, of all models.
        variants: all models but the first, in the report's order.
        notes: about how the report came about, in sentences.
    """

    report: BenchReport
    estimates: Mapping[str, Mapping[str, TaskEstimates]]
    variants: tuple[VariantComparison, ...]
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> ModelRun:
        """The first model."""
        return self.report.models[0]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the reference's order."""
        return tuple(self.reference.tasks)

    def of_task(self, task: str) -> Iterator[tuple[str, TaskComparison]]:
        """Labels of the variants with their comparisons on a task."""
        for variant in self.variants:
            yield variant.label, next(pair for pair in variant.tasks if pair.task == task)

    def all_notes(self) -> list[str]:
        """The notes of the report and of every figure; those with the same words are one."""
        places: dict[str, list[str]] = {note: [] for note in self.notes}
        for run in self.report.models:
            for task in run.tasks.values():
                for origin, count in task.elsewhere.items():
                    note = f"Some answers were made with {origin}, and merged on purpose."
                    places.setdefault(note, []).append(f"{run.label}, {task.task}: {count}")
        for variant in self.variants:
            for compared in variant.tasks:
                for name in _FIGURES:
                    pair: Paired | None = getattr(compared, name)
                    for note in pair.notes if pair else ():
                        places.setdefault(note, []).append(
                            f"{variant.label}, {compared.task}, {name.replace('_', ' ')}"
                        )
            for note in variant.pooled.notes:
                places.setdefault(note, []).append(variant.label)
        return [f"{note} ({'; '.join(where)})" if where else note for note, where in places.items()]

    def to_json(self) -> dict[str, Any]:
        """The comparisons, without the items, as a dictionary that ``json`` can write.

        What is not known is null.
        """
        comparisons = []
        for variant in self.variants:
            comparison = asdict(variant)
            for task, stored in zip(variant.tasks, comparison["tasks"], strict=True):
                stored["score"]["recovery"] = task.score.recovery
            comparisons.append(comparison)
        return {
            "kind": "svsk-bench-comparison",
            "schema_version": 1,
            "baseline": self.reference.label,
            "notes": list(self.notes),
            "comparisons": comparisons,
        }


def analyze(report: BenchReport, notes: Sequence[str] = (), resamples: int = RESAMPLES) -> Analysis:
    """Compare every variant of a report with its reference, the first model.

    Args:
        report: of ``svsk bench``.
        notes: to show with it.
        resamples: of bootstraps and sign-flip tests.

    Returns:
        The comparisons; none if the reference is the only model.

    Raises:
        EvalError: a model has other tasks than the reference, or other items in one.
    """
    reference = report.models[0]
    if not reference.tasks:
        raise EvalError(
            f"{reference.label}: has no tasks, so there is nothing to show."
            " Run `svsk bench --tasks ...`."
        )
    for run in report.models[1:]:
        check_tasks(reference, run)
    binary = {
        name: _binary_figures([run.tasks[name] for run in report.models])
        for name in reference.tasks
    }
    estimates = {
        run.label: {name: _estimates(task, binary[name]) for name, task in run.tasks.items()}
        for run in report.models
    }
    variants = _with_holm(
        [_variant(reference, run, binary, resamples) for run in report.models[1:]]
    )
    return Analysis(report, estimates, tuple(variants), tuple(notes))


def check_tasks(reference: ModelRun, other: ModelRun, where: str = "") -> None:
    """Refuse two models whose items cannot be paired.

    Args:
        reference: the model to compare with.
        other: the model to compare.
        where: file of ``other``, for messages.

    Raises:
        EvalError: they have different tasks, different versions or settings of one, or different
            items in one.
    """
    name = f"{where}: {other.label}" if where else other.label
    if reference.tasks.keys() != other.tasks.keys():
        parts = (
            ("lacks", reference.tasks.keys() - other.tasks),
            ("also has", other.tasks.keys() - reference.tasks),
        )
        differs = " and ".join(
            f"{verb} {', '.join(sorted(names))}" for verb, names in parts if names
        )
        raise EvalError(f"{name} {differs}: expected the tasks of {reference.label}. {_AGAIN}")
    for task, expected in reference.tasks.items():
        task_run = other.tasks[task]
        for field in _COMMON:
            ours, theirs = getattr(expected, field), getattr(task_run, field)
            if ours != theirs:
                raise EvalError(
                    f"{name}: task {task} has {field} {theirs!r}: expected {ours!r} as for"
                    f" {reference.label}. {_AGAIN}"
                )
        _check_items(reference.label, name, expected, task_run)


def _check_items(reference: str, name: str, expected: TaskRun, other: TaskRun) -> None:
    """Refuse other items in a task.

    The message names both models and the first items that differ.
    """
    ours, theirs = _items(expected), _items(other)
    if ours == theirs:
        return
    doc_ids = sorted({doc for doc, _ in set(ours) ^ set(theirs)}) or sorted(
        {doc for doc, _ in ours}
    )
    shown = []
    for doc in doc_ids[:_SHOWN_ITEMS]:
        hashes = [
            sorted(item[:_SHOWN_HASH] for number, item in side if number == doc)
            for side in (theirs, ours)
        ]
        what = [", ".join(side) or "absent" for side in hashes]
        shown.append(f"item {doc}: {what[0]} instead of {what[1]}")
    raise EvalError(
        f"{name}: task {expected.task}: its items differ from those of {reference} ({len(theirs)}"
        f" against {len(ours)}, {len(doc_ids)} of them different; {'; '.join(shown)}). Only the"
        f" same items can be compared. {_CAUSES} {_AGAIN}"
    )


def _items(task: TaskRun) -> list[tuple[int, str]]:
    return sorted(zip(task.doc_ids, task.item_hashes, strict=True))


def _values(task: TaskRun, name: str) -> FloatArray | None:
    """A list of a task as an array [n], or [n, answers], in the order of its items."""
    stored = task.scores[task.primary] if name == "score" else getattr(task, name)
    if stored is None:
        return None
    order = sorted(
        range(len(task.doc_ids)), key=lambda index: (task.doc_ids[index], task.item_hashes[index])
    )
    return np.asarray(stored, dtype=np.float64)[order]


def _binary_figures(runs: Sequence[TaskRun]) -> frozenset[str]:
    """Which figures of a task are rates: those that are 0 or 1 for every item of every model.

    One model alone may have them by chance, and models that are compared need the same method.
    Lengths are counts, also where all of them are 0 or 1.
    """
    figures = {
        name: [_values(run, name) for run in runs] for name in _FIGURES if name != "output_tokens"
    }
    return frozenset(
        name
        for name, lists in figures.items()
        if all(is_binary(values) for values in lists if values is not None)
    )


def _estimates(task: TaskRun, binary: frozenset[str]) -> TaskEstimates:
    values = {name: _values(task, name) for name in _FIGURES}
    figures: dict[str, Any] = {
        name: None if array is None else estimate(array, name in binary)
        for name, array in values.items()
    }
    return TaskEstimates(**figures)  # the schema requires scores of the primary metric


def _variant(
    reference: ModelRun, run: ModelRun, binary: Mapping[str, frozenset[str]], resamples: int
) -> VariantComparison:
    """A variant's comparisons, with raw p-values for Holm's, which need all variants."""
    tasks, scores = [], []
    for name, expected in reference.tasks.items():
        pairs: dict[str, Paired | None] = {}
        for figure in _FIGURES:
            ours, theirs = _values(expected, figure), _values(run.tasks[name], figure)
            if ours is None or theirs is None:
                pairs[figure] = None
                continue
            pairs[figure] = paired(ours, theirs, binary=figure in binary[name], resamples=resamples)
            if figure == "score":
                scores.append((ours, theirs))
        score = pairs["score"]
        assert score is not None  # the schema requires scores of the primary metric
        drawn = [_values(task, "repeat_scores") for task in (expected, run.tasks[name])]
        tasks.append(
            TaskComparison(
                task=name,
                metric=expected.primary,
                score=score,
                p_holm=score.p,
                terminated=pairs["terminated"],
                output_tokens=pairs["output_tokens"],
                by_repeats=None
                if drawn[0] is None or drawn[1] is None
                else detectable_by_repeats(score.detectable, drawn[0], drawn[1]),
            )
        )
    return VariantComparison(run.label, tuple(tasks), pooled(scores, resamples))


def _with_holm(variants: Sequence[VariantComparison]) -> list[VariantComparison]:
    adjusted = iter(holm([task.score.p for variant in variants for task in variant.tasks]))
    return [
        replace(
            variant, tasks=tuple(replace(task, p_holm=next(adjusted)) for task in variant.tasks)
        )
        for variant in variants
    ]
