# SPDX-License-Identifier: Apache-2.0
"""lm-eval's tasks from Python: a reference and its variants, compared item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svsk_eval.bench.command import settings_of
from svsk_eval.bench.options import BenchOptions, Candidate
from svsk_eval.bench.runner import bench
from svsk_eval.errors import EvalError
from svsk_eval.report.analysis import Analysis, analyze
from svsk_eval.report.schema import BenchReport
from svsk_offline.printable import html_table

__all__ = ["Benchmark", "benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and how the variants compare with the reference.

    Attributes:
        report: what ``svsk bench --json`` writes.
        analysis: paired differences with intervals and p-values.
    """

    report: BenchReport
    analysis: Analysis

    def _repr_html_(self) -> str:
        rows = [
            (
                variant.label,
                task.task,
                task.score.n,
                f"{task.score.reference.value:.4f}",
                f"{task.score.variant.value:.4f}",
                f"{task.score.difference:+.4f}"
                + ("" if task.score.se is None else f" ± {task.score.se:.4f}"),
            )
            for variant in self.analysis.variants
            for task in variant.tasks
        ]
        headings = ("model", "task", "items", "reference", "score", "difference")
        return html_table(headings, rows, "; ".join(self.analysis.notes))


def benchmark(
    models: Mapping[str, str | Path],
    reference: str | Path,
    tasks: Sequence[str] = ("svsk_smoke",),
    *,
    engine: str = "vllm",
    limit: int | None = None,
    work_dir: str | Path = "svsk-bench",
    dtype: str = "auto",
    batch_size: int = 8,
    run_unsafe_code: bool = False,
    **settings: Any,
) -> Benchmark:
    """Run lm-eval tasks for a reference and variants, as ``svsk bench`` does.

    Args:
        models: folder or hub name of each variant, by the label that it has in reports.
        reference: the dense model they are made from.
        tasks: names of tasks and groups.
        engine: ``vllm`` or ``hf``.
        limit: items per task, from the first; None for all.
        work_dir: keeps answers; a call that was interrupted goes on there.
        dtype: of the arithmetic.
        batch_size: prompts at a time with ``hf``.
        run_unsafe_code: run programs that the models write, in a sandbox.
        settings: further ones of :func:`svsk_eval.bench.command.settings_of`.

    Raises:
        EvalError: a model, a task or a setting cannot be used.
        SvskError: there is no such model, or another run uses the work folder.
    """
    if not models:
        raise EvalError("models: names no variant, expected {label: folder or hub name}.")
    given: dict[str, Any] = {
        "seed": 1234,
        "gen_kwargs": None,
        "apply_chat_template": False,
        "system_instruction": None,
        "model_args": {},
        **settings,
    }
    chosen = settings_of(",".join(tasks), engine=engine, limit=limit, **given)
    options = BenchOptions(
        work_dir=Path(work_dir),
        dtype=dtype,
        include_path=None,
        batch_size=batch_size,
        consent=run_unsafe_code,
        text=None,
        command="svsk_eval.benchmark",
    )
    candidates = [Candidate("reference", str(reference))]
    candidates += [Candidate(label, str(name)) for label, name in models.items()]
    report = bench(candidates, chosen, options, lambda label, step: None)
    return Benchmark(report, analyze(report))
