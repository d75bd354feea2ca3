# SPDX-License-Identifier: Apache-2.0
"""Are the scores of ``svsk bench`` those of lm-eval's own command, item by item?

``python -m svsk_eval.report.lm_eval_samples REPORT LABEL SAMPLES...`` compares a model of a file of
``svsk bench --json`` with what ``lm_eval run --log_samples`` wrote, and exits with 1 where an item
differs.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from svsk_eval.errors import EvalError
from svsk_eval.report.schema import BenchReport, TaskRun, load_report
from svsk_kernels.errors import SvskError

__all__ = ["SameScores", "compare_with_samples", "main"]

_NAME: Final = re.compile(r"samples_(.+)_\d{4}-\d{2}-\d{2}T[\d.-]+\.jsonl")
_SHOWN: Final = 10
_AGAIN: Final = "Name the files that `lm_eval run --log_samples --output_path DIR` wrote."


@dataclass(frozen=True)
class SameScores:
    """One metric of one task in both.

    Attributes:
        task: its name.
        metric: metric and filter, as in the report.
        items: that both scored.
        different: numbers of the items whose scores are not the same.
    """

    task: str
    metric: str
    items: int
    different: tuple[int, ...]


def compare_with_samples(
    report: BenchReport, label: str, samples: Sequence[Path]
) -> list[SameScores]:
    """Compare a model's scores with those that lm-eval's own command gave.

    Args:
        report: of ``svsk bench``.
        label: of the model in it.
        samples: files of ``lm_eval run --log_samples``, one or more for each task.

    Returns:
        All metrics of the report, in the order of the files.

    Raises:
        EvalError: there is no such model or task, a file cannot be read or lacks a metric, or the
            two scored other items.
    """
    runs = {run.label: run for run in report.models}
    if label not in runs:
        raise EvalError(f"There is no model {label!r} in the report, expected {', '.join(runs)}.")
    found = []
    for path in samples:
        name = _NAME.fullmatch(path.name)
        if name is None:
            raise EvalError(f"{path}: expected a name like samples_TASK_DATE.jsonl. {_AGAIN}")
        task = runs[label].tasks.get(name[1])
        if task is None:
            known = ", ".join(runs[label].tasks)
            raise EvalError(f"{path}: the report has no task {name[1]}, expected {known}.")
        found += _compare(task, path, _scores(path))
    return found


def _scores(path: Path) -> dict[str, dict[int, float]]:
    """Scores of items by metric and filter."""
    scores: dict[str, dict[int, float]] = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                sample = json.loads(line)
                for metric in sample["metrics"]:
                    value = sample[metric]
                    if isinstance(value, int | float):
                        kind = f"{metric},{sample['filter']}"
                        scores.setdefault(kind, {})[int(sample["doc_id"])] = float(value)
    except OSError as error:
        raise EvalError(
            f"{path}: cannot read these samples ({error.strerror}). {_AGAIN}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise EvalError(f"{path}: not a file of samples ({error!r}). {_AGAIN}") from error
    return scores


def _compare(task: TaskRun, path: Path, scores: dict[str, dict[int, float]]) -> list[SameScores]:
    found = []
    for metric, values in task.scores.items():
        ours = dict(zip(task.doc_ids, values, strict=True))
        theirs = scores.get(metric)
        if theirs is None:
            raise EvalError(f"{path}: has {', '.join(scores) or 'no scores'}, expected {metric}.")
        if ours.keys() != theirs.keys():
            raise EvalError(
                f"{path}: has {len(theirs)} items, and the report {len(ours)},"
                f" {len(ours.keys() ^ theirs.keys())} of them not in both. Run both with the same"
                " --limit."
            )
        different = tuple(item for item in sorted(ours) if ours[item] != theirs[item])
        found.append(SameScores(task.task, metric, len(ours), different))
    return found


def main(arguments: Sequence[str]) -> int:
    """Compare and print; the exit status."""
    console = Console(soft_wrap=True)
    try:
        if len(arguments) < 3:
            raise EvalError("Expected REPORT LABEL SAMPLES...: a file, a model in it, and files.")
        report, label, *samples = arguments
        found = compare_with_samples(load_report(report), label, [Path(name) for name in samples])
    except SvskError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    for one in found:
        numbers = ", ".join(map(str, one.different[:_SHOWN]))
        more = ", ..." if len(one.different) > _SHOWN else ""
        differs = f", different: {len(one.different)} (items {numbers}{more})"
        same = f"{one.items - len(one.different)} of {one.items} items the same"
        console.print(
            f"{one.task} {one.metric}: {same}{differs if one.different else ''}", markup=False
        )
    return 1 if any(one.different for one in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
