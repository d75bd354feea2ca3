# SPDX-License-Identifier: Apache-2.0
"""Make a model at several sizes and by other quantisers, score all, and put a report together.

Every step's result is kept in the sweep's folder: a run that was killed goes on with the step under
way, where a quantisation goes on after its last finished block, and repeats no finished one. A
model that cannot be made or scored is reported and does not stop the others.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch

from svsk_eval.bench.options import BenchOptions, Candidate
from svsk_eval.bench.runner import bench
from svsk_eval.bench.work_folder import hardware
from svsk_eval.report.analysis import Analysis, analyze
from svsk_eval.report.schema import BenchReport
from svsk_eval.sweep.request import SweepRequest, Variant
from svsk_eval.sweep.schema import Recovery, Size, SweepReport, SweepRow, TaskScore
from svsk_eval.sweep.settings import claim_folder, sweep_settings
from svsk_eval.sweep.steps import StepProgress, Steps, check_peers, peer_title
from svsk_eval.text.engine_args import served_dtype
from svsk_eval.text.models import check_longest, declared_limits
from svsk_kernels.errors import SvskError, one_line
from svsk_offline.calibration.token_budget import sample_count
from svsk_offline.pipeline import load_texts, resolve_device
from svsk_offline.preflight import check_apart
from svsk_offline.storage.atomic import write_text
from svsk_offline.storage.dense_model import ModelSource
from svsk_offline.storage.hub import resolve_model
from svsk_offline.storage.locks import LOCK_NAME, locked
from svsk_vllm.format.spec import TensorSpec

__all__ = ["sweep"]

_REFERENCE: Final = "reference"


def sweep(
    request: SweepRequest,
    progress: StepProgress,
    message: Callable[[str], None],
    save: Callable[[SweepReport], None],
) -> SweepReport:
    """Run a sweep, or go on with it.

    Args:
        request: what is asked for.
        progress: see :data:`StepProgress`.
        message: told what a reader of a log should know.
        save: called with the report as soon as texts are scored, and again after the tasks.

    Raises:
        SvskError: the request cannot be carried out, or the folder holds something else.
    """
    resolve_device(request.device)
    folder = resolve_model(request.model, trust_remote_code=request.trust_remote_code)
    check_apart(request.out, folder)
    source = ModelSource(folder, trust_remote_code=request.trust_remote_code)
    source.check()
    longest = declared_limits(folder, trust_remote_code=request.trust_remote_code)[1]
    check_longest(folder, longest, request.seq_len)
    request.out.mkdir(parents=True, exist_ok=True)
    with locked(request.out / LOCK_NAME, request.out):
        names = ", ".join(request.calibration)
        asked = sample_count(source, request.recipe, lambda text: None, names)
        texts = load_texts(source, request.calibration, request.recipe, False, message)
        settings = sweep_settings(request, source, texts)
        claim_folder(request.out, settings)
        steps = Steps(request, folder, texts, asked, progress)
        check_peers(steps)
        errors = {one.label: _make_and_score(steps, one) for one in request.variants}

        def report(analysis: Analysis | None) -> SweepReport:
            return SweepReport(
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                command=request.command,
                hardware=hardware(),
                model=folder.name,
                settings=settings,
                rows=tuple(_rows(steps, source, errors, analysis)),
            )

        done = report(None)
        save(done)
        if request.tasks is not None:
            done = report(analyze(_run_tasks(steps, errors)))
            save(done)
        return done


def _make_and_score(steps: Steps, variant: Variant) -> str | None:
    """Do what is left to do for a model; why it cannot be done, in a line, if so."""
    try:
        scored = steps.text(variant) is not None
        if not scored or steps.request.tasks is not None:
            steps.make(variant)
        steps.size(variant)
        if not scored:
            steps.score(variant)
    except SvskError as error:
        steps.progress(variant.label, f"failed: {one_line(error)}", 0, 0)
        return one_line(error)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the processes that score
    return None


def _run_tasks(steps: Steps, errors: dict[str, str | None]) -> BenchReport:
    """Run the tasks for the reference and every model that was made."""
    request, tasks = steps.request, steps.request.tasks
    assert tasks is not None, "asked for"
    made = [one for one in request.variants if errors[one.label] is None]
    report = bench(
        [
            Candidate(_REFERENCE, str(steps.model)),
            *(Candidate(one.label, str(steps.folder(one))) for one in made),
        ],
        tasks.settings,
        BenchOptions(
            work_dir=request.out / "tasks",
            dtype=_task_dtype(steps),
            include_path=tasks.include_path,
            batch_size=tasks.batch_size,
            consent=tasks.consent,
            text=None,
            command=request.command,
        ),
        lambda label, step: steps.progress(label, step.what, step.done, step.known),
    )
    write_text(request.out / "tasks.json", report.model_dump_json(indent=1) + "\n")
    return report


def _task_dtype(steps: Steps) -> str:
    """One arithmetic for all: the folders of peers are float32, and would be served as that."""
    tasks = steps.request.tasks
    assert tasks is not None, "asked for"
    if tasks.dtype != "auto" or tasks.settings.engine == "hf" or not steps.request.peers:
        return tasks.dtype
    served = served_dtype("auto")
    if served != "auto":
        return served
    return str(ModelSource(steps.model).model_dtype("auto")).removeprefix("torch.")


def _rows(
    steps: Steps,
    source: ModelSource,
    errors: dict[str, str | None],
    analysis: Analysis | None,
) -> Iterable[SweepRow]:
    yield SweepRow(
        label=_REFERENCE,
        title=steps.model.name,
        kind="reference",
        size=_dense_size(source),
        tasks=_task_scores(analysis, _REFERENCE),
    )
    for variant in steps.request.variants:
        error = errors[variant.label]
        kind, title = variant.kind, variant.title
        if error is not None:
            yield SweepRow(label=variant.label, title=title, kind=kind, error=error)
            continue
        size = steps.size(variant)
        yield SweepRow(
            label=variant.label,
            title=peer_title(size) if kind == "peer" else title,
            kind=kind,
            size=size,
            text=steps.text(variant),
            tasks=_task_scores(analysis, variant.label),
            recovery=_recovery(analysis, variant.label),
        )


def _dense_size(source: ModelSource) -> Size:
    """Of the dense model, as it is stored."""
    linears = [source.tensors.describe(f"{name}.weight") for name in source.block_linears()]
    stored = [source.tensors.describe(name) for name in source.tensors.names]
    return Size(
        bits_per_weight=_bits_per_weight(linears),
        bits_per_weight_of_all=_bits_per_weight(stored),
        size_bytes=sum(one.num_bits for one in stored) // 8,
    )


def _bits_per_weight(tensors: Sequence[TensorSpec]) -> float:
    return sum(one.num_bits for one in tensors) / sum(math.prod(one.shape) for one in tensors)


def _task_scores(analysis: Analysis | None, label: str) -> dict[str, TaskScore]:
    if analysis is None:
        return {}
    [run] = [run for run in analysis.report.models if run.label == label]
    return {
        name: TaskScore(
            metric=task.primary,
            items=len(task.doc_ids),
            score=analysis.estimates[label][name].score.value,
            score_se=analysis.estimates[label][name].score.se,
        )
        for name, task in run.tasks.items()
    }


def _recovery(analysis: Analysis | None, label: str) -> Recovery | None:
    if analysis is None:
        return None
    [over] = [variant.pooled for variant in analysis.variants if variant.label == label]
    if over.recovery is None:
        return None
    limits = over.recovery_interval
    if limits is None:
        return Recovery(mean=over.recovery)
    return Recovery(mean=over.recovery, low=limits.low, high=limits.high)
