# SPDX-License-Identifier: Apache-2.0
"""Run lm-eval tasks for a reference and its variants, on the same items and seeds."""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from svsk_eval.bench.fingerprint import source_hash, text_sources
from svsk_eval.bench.model_folder import Folder, bits_per_weight, read_folder
from svsk_eval.bench.progress import NOTE, Step
from svsk_eval.bench.work_folder import hardware, other_answers, work_folder
from svsk_eval.bench.worker import TaskResult, WorkerRequest
from svsk_eval.errors import EvalError
from svsk_eval.processes import run_request
from svsk_eval.report.analysis import check_tasks
from svsk_eval.report.schema import (
    BenchReport,
    BenchSettings,
    Engine,
    Generation,
    ModelRun,
    TextScores,
)
from svsk_eval.text.request import TextRequest
from svsk_offline.storage.locks import LOCK_NAME, locked
from svsk_offline.storage.model_loading import resolve_model
from svsk_vllm.version import __version__

__all__ = [
    "BenchOptions",
    "Candidate",
    "TextOptions",
    "bench",
    "candidate",
    "hardware",
    "package_versions",
]

BenchProgress = Callable[[str, Step], None]
"""Called with a model's label and what it is at."""


@dataclass(frozen=True)
class Candidate:
    """A model that takes part.

    Attributes:
        label: its name in reports.
        name: as it was given, a folder or a hub name.
    """

    label: str
    name: str


@dataclass(frozen=True)
class TextOptions:
    """A text to score, as with ``svsk eval``.

    Attributes:
        text: plain text file.
        chunks: how many to score.
        seq_len: tokens per chunk.
        engines: ``hf`` for KL, top-1 and NLL of the dequantised weights, ``vllm`` for the NLL of
            the served model.
    """

    text: Path
    chunks: int
    seq_len: int
    engines: tuple[Engine, ...]


@dataclass(frozen=True)
class BenchOptions:
    """What is not in the report's settings.

    Attributes:
        work_dir: holds answers and results by model; a run that is started again goes on there.
        dtype: of the arithmetic, ``auto`` or torch's name.
        include_path: folder of further tasks, or None.
        batch_size: prompts at a time with ``hf``.
        consent: whether code that a model writes may be run.
        merge_answers: take answers to the same requests that other hardware, versions or code
            computed, where a work folder has some; the report says how many.
        text: a text to score too, or None.
        command: for the report.
    """

    work_dir: Path
    dtype: str
    include_path: Path | None
    batch_size: int
    consent: bool
    text: TextOptions | None
    command: str
    merge_answers: bool = False


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
            _score_text(one, folder, folders[0], settings, options, progress)
            for one, folder in pairs
        ]
        models: list[ModelRun] = []
        for index, (one, folder) in enumerate(pairs):
            same = sum(folder.fingerprint == other.fingerprint for other in folders[:index])
            results = _run_tasks(one, folder, same, settings, options, progress)
            models.append(_model_run(one, folder, bits[index], results, texts[index]))
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
    settings: BenchSettings,
    options: BenchOptions,
    progress: BenchProgress,
) -> list[TaskResult]:
    """Run a model's tasks.

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
        merged={str(other.journal): other.origin for other in others}
        if options.merge_answers
        else {},
    )
    progress(one.label, Step("starting"))
    files: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if "files" in message:
            files.extend(message["files"])
        elif "note" in message:
            progress(one.label, Step(f"{NOTE}{message['note']}"))
        else:
            progress(one.label, Step(**message["step"]))

    run_request("svsk_eval.bench.worker", request, work, one.label, take)
    return [_read_result(Path(file)) for file in files]


def _read_result(path: Path) -> TaskResult:
    try:
        return TaskResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvalError(
            f"{path}: is damaged ({error}). Delete it: the task is scored again from its answers."
        ) from error


def _score_text(
    one: Candidate,
    folder: Folder,
    reference: Folder,
    settings: BenchSettings,
    options: BenchOptions,
    progress: BenchProgress,
) -> tuple[TextScores, ...]:
    """What ``svsk eval`` says of the model, in a process so that its memory is free afterwards."""
    if options.text is None:
        return ()
    text = options.text
    content = hashlib.sha256(_read(text.text)).hexdigest()
    scores = []
    for engine in text.engines:
        shared = _ENGINE_ARGUMENTS if engine == settings.engine == "vllm" else set()
        is_reference = folder.fingerprint == reference.fingerprint
        request = TextRequest(
            model=str(folder.path.absolute()),
            reference=None if is_reference else str(reference.path.absolute()),
            text=text.text.absolute(),
            chunks=text.chunks,
            seq_len=text.seq_len,
            engine=engine,
            dtype=options.dtype,
            engine_args={
                name: settings.model_args[name] for name in shared & settings.model_args.keys()
            },
            trust_remote_code=bool(settings.model_args.get("trust_remote_code")),
        )
        # Files count by their contents, wherever they lie.
        others = request.model_dump(exclude={"model", "reference", "text"})
        asked = [folder.fingerprint, reference.fingerprint, content, others]
        asked.append(source_hash(text_sources()))
        work = work_folder(options.work_dir, one.label, "text", asked)
        result = work / "scores.json"
        if not result.is_file():
            show = partial(Step, f"text, {engine}")
            progress(one.label, show())

            def take(message: dict[str, Any], show: Callable[..., Step] = show) -> None:
                progress(one.label, show(message["done"], message["total"]))

            run_request("svsk_eval.text.worker", request, work, one.label, take)
        figures: dict[str, Any] = json.loads(result.read_bytes())
        fields = {name: figures[name] for name in TextScores.model_fields if name in figures}
        scores.append(TextScores.model_validate(fields | {"engine": engine}))
    return tuple(scores)


_ENGINE_ARGUMENTS: Final = {
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_dtype",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "quantization",
    "revision",
    "tensor_parallel_size",
    "tokenizer",
}
"""Model arguments that also concern the scoring of a text: how and where the model runs."""


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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvalError(f"{path}: cannot read it ({error.strerror}).") from error
