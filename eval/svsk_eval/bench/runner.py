# SPDX-License-Identifier: Apache-2.0
"""Run lm-eval tasks for a reference and its variants, on the same items and seeds."""

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from svsk_eval.bench.beside import score_answers, score_text
from svsk_eval.bench.options import BenchOptions, BenchProgress, Candidate
from svsk_eval.bench.progress import NOTE, Step
from svsk_eval.bench.work_folder import hardware, other_answers, work_folder
from svsk_eval.bench.worker import TaskResult, WorkerRequest
from svsk_eval.errors import EvalError, first_problem
from svsk_eval.processes import run_request
from svsk_eval.report.analysis import check_tasks
from svsk_eval.report.schema import (
    BenchReport,
    BenchSettings,
    Engine,
    Generation,
    ModelRun,
    ReferenceAnswers,
    TextScores,
)
from svsk_eval.text.model_folder import Folder, bits_per_weight, read_folder
from svsk_offline.storage.hub import resolve_model
from svsk_offline.storage.locks import LOCK_NAME, locked
from svsk_vllm.version import __version__

__all__ = ["bench", "candidate", "package_versions"]


def candidate(text: str) -> Candidate:
    """Read ``LABEL=MODEL`` or ``MODEL``, whose label is the last part of its name.

    Raises:
        EvalError: label or model is empty.
    """
    label, sign, name = text.partition("=")
    if not sign or Path(text).is_dir():
        label, name = Path(text).name or text, text
    if not label.strip() or not name.strip():
        raise EvalError(f"{text!r}: expected MODEL or LABEL=MODEL.")
    return Candidate(label.strip(), name.strip())


def package_versions(engine: Engine) -> dict[str, str]:
    """Versions of the packages that decide scores."""
    names = ["lm_eval", "torch", "transformers", *(["vllm"] if engine == "vllm" else [])]
    versions = {"svsk-vllm": __version__}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise EvalError(
                f"The package {name} is not installed: pip install 'svsk-vllm[eval]'."
            ) from error
    return versions


def bench(
    candidates: Sequence[Candidate],
    settings: BenchSettings,
    options: BenchOptions,
    progress: BenchProgress,
) -> BenchReport:
    """Run every model, one after the other, each in a process of its own.

    What is in the work folder already is not run again, so that a run that was killed, at whatever
    point, goes on where it was when it is started again. Answers belong to a model by its files'
    contents, and to the settings that can change them, not to its name.

    Args:
        candidates: the reference first.
        settings: of the run.
        options: the rest.
        progress: see :data:`BenchProgress`.

    Raises:
        EvalError: a model, a task, the text or a setting cannot be used.
        SvskError: there is no such model, or another run uses the work folder.
    """
    labels = [one.label for one in candidates]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise EvalError(f"{', '.join(twice)}: two models have this label. Name them: LABEL=MODEL.")
    trust = bool(settings.model_args.get("trust_remote_code"))
    folders = [read_folder(resolve_model(one.name, trust_remote_code=trust)) for one in candidates]
    if options.text is not None:
        from svsk_eval.text.models import check_longest, declared_limits

        # each scores the text in its turn; what cannot is told before the first
        for folder in folders:
            longest = declared_limits(folder.path, trust_remote_code=trust)[1]
            check_longest(folder.path, longest, options.text.seq_len)
    bits = bits_per_weight(folders[0], folders)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    with locked(options.work_dir / LOCK_NAME, options.work_dir):
        # Texts first: they take minutes, and show whether a model can be loaded.
        pairs = list(zip(candidates, folders, strict=True))
        texts = [
            score_text(one, folder, folders[0], settings, options, progress)
            for one, folder in pairs
        ]
        models: list[ModelRun] = []
        for index, (one, folder) in enumerate(pairs):
            same = sum(folder.fingerprint == other.fingerprint for other in folders[:index])
            results, answers = _run_tasks(
                one, folder, same, index == 0, settings, options, progress
            )
            run = _model_run(one, folder, bits[index], results, texts[index])
            if index == 0:
                # The same holds here: minutes, before the variants take hours.
                scored = [
                    score_answers(other, theirs, folders[0], answers, settings, options, progress)
                    for other, theirs in pairs[1:]
                ]
            else:
                run = _with_scores(run, scored[index - 1])
            models.append(run)
            check_tasks(models[0], models[-1])  # now rather than after all models
    return BenchReport(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=options.command,
        hardware=hardware(),
        settings=settings,
        models=tuple(models),
    )


def _run_tasks(
    one: Candidate,
    folder: Folder,
    same: int,
    is_reference: bool,
    settings: BenchSettings,
    options: BenchOptions,
    progress: BenchProgress,
) -> tuple[list[TaskResult], list[Path]]:
    """Run a model's tasks; of the reference also files of its answers' tokens, if asked for.

    ``same`` models before it are the same one, and its answers are to be its own.
    """
    # What changes a model's answers decides where they are kept; prompts and generation settings
    # are in their keys.
    asked = [
        folder.fingerprint,
        settings.engine,
        options.dtype,
        settings.seed,
        settings.model_args,
        same,
    ]
    batch = options.batch_size if settings.engine == "hf" else None
    work = work_folder(options.work_dir, one.label, "answers", asked, [batch])
    others = other_answers(work)
    for other in others:
        taken = (
            "are merged" if options.merge_answers else "are not used; --merge-answers takes them"
        )
        text = f"{other.count} answers in {other.journal.parent.name} were made with {other.origin}"
        progress(one.label, Step(f"{NOTE}{text}, and {taken}"))
    request = WorkerRequest(
        model=folder.path.absolute(),
        folder=work.absolute(),
        settings=settings,
        dtype=options.dtype,
        include_path=options.include_path and options.include_path.absolute(),
        batch_size=options.batch_size,
        consent=options.consent,
        earlier=same,
        reference_answers=options.reference_answers if is_reference else 0,
        merged={str(other.journal): other.origin for other in others}
        if options.merge_answers
        else {},
    )
    progress(one.label, Step("starting"))
    files: list[str] = []
    answers: list[Path] = []

    def take(message: dict[str, Any]) -> None:
        if "files" in message:
            files.extend(message["files"])
            answers.extend(map(Path, message["answers"]))
        elif "note" in message:
            progress(one.label, Step(f"{NOTE}{message['note']}"))
        else:
            progress(one.label, Step(**message["step"]))

    run_request("svsk_eval.bench.worker", request, work, one.label, take)
    return [_read_result(Path(file)) for file in files], answers


def _read_result(path: Path) -> TaskResult:
    try:
        return TaskResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error.strerror
        raise EvalError(
            f"{path}: is damaged ({why}). Delete it: the task is scored again from its answers."
        ) from error


def _with_scores(run: ModelRun, scored: dict[str, ReferenceAnswers]) -> ModelRun:
    tasks = {
        name: task.model_copy(update={"on_reference": scored.get(name)})
        for name, task in run.tasks.items()
    }
    return run.model_copy(update={"tasks": tasks})


def _model_run(
    one: Candidate,
    folder: Folder,
    bpw: float | None,
    results: list[TaskResult],
    texts: tuple[TextScores, ...],
) -> ModelRun:
    speeds = [task.generation for task in results if task.generation is not None]
    generation = None
    if speeds:
        generation = Generation(
            tokens=sum(s.tokens for s in speeds), seconds=sum(s.seconds for s in speeds)
        )
    return ModelRun(
        label=one.label,
        model=one.name if not Path(one.name).exists() else folder.path.resolve().name,
        fingerprint=folder.fingerprint,
        method=folder.method,
        bpw=bpw,
        size_bytes=folder.size_bytes,
        dtype=results[0].dtype,
        generation=generation,
        tasks={task.run.task: task.run for task in results},
        text=texts,
    )
