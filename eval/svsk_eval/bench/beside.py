# SPDX-License-Identifier: Apache-2.0
"""What is scored of a model beside its tasks: a text, and the reference's own answers.

Both are `svsk eval`'s figures, in a process of their own, kept in the work folder.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from svsk_eval.bench.fingerprint import answer_sources, source_hash, text_sources
from svsk_eval.bench.options import BenchOptions, BenchProgress, Candidate
from svsk_eval.bench.progress import Step
from svsk_eval.bench.reference_answers import AnswersRequest, TaskAnswers
from svsk_eval.bench.work_folder import work_folder
from svsk_eval.errors import EvalError
from svsk_eval.processes import run_request
from svsk_eval.report.schema import BenchSettings, ReferenceAnswers, TextScores
from svsk_eval.text.model_folder import Folder
from svsk_eval.text.request import TextRequest

__all__ = ["score_answers", "score_text"]

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


def score_text(
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


def score_answers(
    one: Candidate,
    folder: Folder,
    reference: Folder,
    answers: Sequence[Path],
    settings: BenchSettings,
    options: BenchOptions,
    progress: BenchProgress,
) -> dict[str, ReferenceAnswers]:
    """A variant's figures on the reference's own answers, by task; in a process of its own."""
    if not answers:
        return {}
    device = settings.model_args.get("device")
    asked = [folder.fingerprint, reference.fingerprint, options.dtype, device]
    asked += [hashlib.sha256(_read(path)).hexdigest() for path in answers]
    asked.append(source_hash(answer_sources()))
    work = work_folder(options.work_dir, one.label, "on-reference", asked)
    request = AnswersRequest(
        model=folder.path.absolute(),
        reference=reference.path.absolute(),
        answers=tuple(path.absolute() for path in answers),
        folder=work.absolute(),
        dtype=options.dtype,
        device=None if device is None else str(device),
        trust_remote_code=bool(settings.model_args.get("trust_remote_code")),
    )
    tasks = [TaskAnswers.model_validate_json(_read(path)).task for path in answers]
    files = {task: work / f"scores-{task}.json" for task in tasks}
    if not all(path.is_file() for path in files.values()):
        show = partial(Step, "the reference's answers")
        progress(one.label, show())

        def take(message: dict[str, Any]) -> None:
            progress(one.label, show(message["done"], message["total"]))

        run_request("svsk_eval.bench.reference_answers", request, work, one.label, take)
    return {task: ReferenceAnswers.model_validate_json(_read(path)) for task, path in files.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvalError(
            f"{path}: cannot read it ({error.strerror}). Take another --work-dir."
        ) from error
