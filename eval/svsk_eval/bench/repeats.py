# SPDX-License-Identifier: Apache-2.0
"""Several answers to each item: whether that makes sense for a task, and their mean."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from svsk_eval.bench.journaled_model import is_sampled
from svsk_eval.errors import EvalError
from svsk_eval.report.schema import TaskRun

__all__ = ["check_repeats", "mean_of_runs"]


def check_repeats(name: str, task: Any, repeats: int) -> None:
    """Refuse several answers to an item that would all be the same, or are asked for twice.

    Args:
        name: of the task.
        task: lm-eval's object, of a task that generates, with the settings of the run.
        repeats: answers to each item.

    Raises:
        EvalError: see above.
    """
    if repeats == 1:
        return
    settings = task.get_config("generation_kwargs") or {}
    if not is_sampled(settings):
        raise EvalError(
            f"--repeats {repeats}: the answers of {name} are greedy, and would all be the same."
            " Have them drawn: --gen-kwargs do_sample=true,temperature=0.6"
        )
    if "seed" in settings:
        raise EvalError(
            f"--repeats {repeats}: {name} draws with seed={settings['seed']}, and all answers would"
            " be the same. Leave it out of --gen-kwargs: --seed gives each answer one of its own."
        )
    if task.get_config("repeats") > 1:
        raise EvalError(
            f"--repeats {repeats}: {name} draws {task.get_config('repeats')} answers to an item by"
            " itself. Leave --repeats out."
        )


def mean_of_runs(runs: Sequence[TaskRun]) -> TaskRun:
    """Several answers to each item as one run, whose figures are the means over an item's answers.

    Args:
        runs: of the same items, an answer each.
    """
    if len(runs) == 1:
        return runs[0]

    def means(columns: Sequence[Sequence[float] | None]) -> tuple[float, ...] | None:
        known = [column for column in columns if column is not None]
        return tuple(float(np.mean(values)) for values in zip(*known, strict=True)) or None

    first = runs[0]
    return first.model_copy(
        update={
            "scores": {name: means([run.scores[name] for run in runs]) for name in first.scores},
            "repeat_scores": tuple(zip(*(run.scores[run.primary] for run in runs), strict=True)),
            "output_tokens": means([run.output_tokens for run in runs]),
            "terminated": means([run.terminated for run in runs]),
        }
    )
