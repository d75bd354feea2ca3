# SPDX-License-Identifier: Apache-2.0
"""Two models over several tasks that count the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from svsk_eval.errors import EvalError
from svsk_eval.report.detectable import detectable_over_tasks
from svsk_eval.report.paired_statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    Interval,
    all_equal,
    batch_size,
    sign_flip_p,
)

__all__ = ["Pooled", "pooled"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pooled:
    """A variant against the reference over several tasks, each task with the same weight.

    Attributes:
        tasks: that ``difference`` is over.
        reference: mean of the reference's scores.
        variant: mean of the variant's.
        difference: variant - reference.
        interval: of the difference, stratified bootstrap; None where undefined.
        p: two-sided p-value of the difference being zero, sign flips.
        detectable: the smallest difference that such items would show, see
            :mod:`svsk_eval.report.detectable`; None where there is none.
        recovery: mean of the tasks' recoveries, over ``recovery_tasks`` tasks; None if there is
            none.
        recovery_interval: of the recovery, stratified bootstrap; None where undefined.
        recovery_tasks: tasks with a recovery, those in which the reference scores above zero.
        notes: what a reader of the figures should know, in sentences.
    """

    tasks: int
    reference: float
    variant: float
    difference: float
    interval: Interval | None
    p: float
    detectable: float | None
    recovery: float | None
    recovery_interval: Interval | None
    recovery_tasks: int
    notes: tuple[str, ...] = ()


def pooled(pairs: Sequence[tuple[FloatArray, FloatArray]], resamples: int = RESAMPLES) -> Pooled:
    """Compare two models over several tasks that count the same.

    The bootstrap is stratified: items are drawn with replacement within each task, both models'
    together, and the interval is by percentiles (Davison and Hinkley, *Bootstrap Methods and their
    Application*, 1997, section 3.2). The tasks are taken as given: the interval says nothing about
    other tasks. The test flips the signs of the items' differences, each divided by its task's
    number of items.

    Args:
        pairs: for each task the reference's and the variant's values, [n_t] each.
        resamples: of the bootstrap and the sign flips.

    Raises:
        EvalError: there is no task.
    """
    if not pairs:
        raise EvalError("There is no task to pool: expected at least one. Name tasks with --tasks.")
    means = np.array([[one.mean(), other.mean()] for one, other in pairs])
    judged = means[:, 0] > 0
    notes: list[str] = []
    interval = recovery_interval = None
    if min(len(one) for one, _ in pairs) < 2:
        notes.append("A task has one item, so there is no interval over tasks.")
    elif all(all_equal(other - one) for one, other in pairs):
        notes.append(
            "Within each task all items differ by the same amount,"
            " so there is no interval over tasks."
        )
    else:
        drawn = _stratified_means(pairs, resamples)
        interval = _percentiles((drawn[:, :, 1] - drawn[:, :, 0]).mean(axis=1))
        references, variants = drawn[:, judged, 0], drawn[:, judged, 1]
        if judged.any() and (references > 0).all():
            recovery_interval = _percentiles((variants / references).mean(axis=1))
        elif judged.any():
            notes.append(
                "The reference scores too close to zero in a task for"
                " an interval of the mean recovery."
            )
    if not judged.all():
        notes.append(
            f"The reference scores zero or less in {int((~judged).sum())} task(s),"
            " which have no recovery."
        )
    weighted = np.concatenate([(other - one) / len(one) for one, other in pairs])
    return Pooled(
        tasks=len(pairs),
        reference=float(means[:, 0].mean()),
        variant=float(means[:, 1].mean()),
        difference=float((means[:, 1] - means[:, 0]).mean()),
        interval=interval,
        p=sign_flip_p(weighted, resamples),
        detectable=detectable_over_tasks([other - one for one, other in pairs]),
        recovery=float((means[judged, 1] / means[judged, 0]).mean()) if judged.any() else None,
        recovery_interval=recovery_interval,
        recovery_tasks=int(judged.sum()),
        notes=tuple(notes),
    )


def _percentiles(values: FloatArray) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _stratified_means(pairs: Sequence[tuple[FloatArray, FloatArray]], resamples: int) -> FloatArray:
    """Means of reference and variant in resampled tasks, [resamples, tasks, 2]."""
    rng = np.random.default_rng(SEED)
    means = np.empty((resamples, len(pairs), 2))
    for task, (reference, variant) in enumerate(pairs):
        n = len(reference)
        for start in range(0, resamples, batch_size(n)):
            rows = min(batch_size(n), resamples - start)
            chosen = rng.integers(n, size=(rows, n))
            means[start : start + rows, task, 0] = reference[chosen].mean(axis=1)
            means[start : start + rows, task, 1] = variant[chosen].mean(axis=1)
    return means
