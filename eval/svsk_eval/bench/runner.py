# SPDX-License-Identifier: Apache-2.0
"""Run lm-eval tasks for a reference and its variants, on the same items and seeds, and put the scores together."""

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from svsk_eval.bench.folders import Folder, bits_per_weight, read_folder
from svsk_eval.bench.schema import BenchReport, BenchSettings, Engine, Generation, ModelRun, TextScores
from svsk_eval.bench.worker import WorkerRequest, WorkerResult
from svsk_eval.errors import EvalError
from svsk_offline.atomic import write_text
from svsk_offline.source import resolve_model
from svsk_vllm.version import __version__

__all__ = ["BenchOptions", "Candidate", "TextOptions", "bench", "candidate", "package_versions"]

_LOG_LINES: Final = 25

Progress = Callable[[str, str, int, int], None]
"""Called with a model's label, what it does, and the numbers of requests that are done and that are known."""


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
        engines: ``hf`` for KL, top-1 and NLL of the dequantised weights, ``vllm`` for the NLL of the served model.
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


def candidate(text: str) -> Candidate:
    """Read ``LABEL=MODEL`` or ``MODEL``, whose label is the last part of its name.

    Raises:
        EvalError: label or model is empty.
    """
    label, sign, name = text.partition("=")
    if not sign:
        label, name = Path(text).name or text, text
    if not label.strip() or not name.strip():
        raise EvalError(f"{text!r}: expected MODEL or LABEL=MODEL.")
    return Candidate(label.strip(), name.strip())


def package_versions(engine: Engine) -> dict[str, str]:
    """Versions of the packages that decide scores."""
    names = ["lm_eval", "torch", "transformers", *(["vllm"] if engine == "vllm" else [])]
    found = {"svsk-vllm": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise EvalError(f"The package {name} is not installed: pip install 'svsk-vllm[eval]'.") from error
    return found


def bench(
    candidates: Sequence[Candidate], settings: BenchSettings, options: BenchOptions, progress: Progress
) -> BenchReport:
    """Run every model, one after the other, each in a process of its own.

    What is in the work folder already is not run again, so that a run that was killed, at whatever point, goes on where
    it was when it is started again. Answers belong to a model by its files' contents, and to the settings that can
    change them, not to its name.

    Args:
        candidates: the reference first.
        settings: of the run.
        options: the rest.
        progress: see :data:`Progress`.

    Raises:
        EvalError: a model, a task, the text or a setting cannot be used.
        SvskError: there is no such model.
    """
    labels = [one.label for one in candidates]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise EvalError(f"{', '.join(twice)}: two models have this label. Name them: LABEL=MODEL.")
    folders = [read_folder(resolve_model(one.name)) for one in candidates]
    options.work_dir.mkdir(parents=True, exist_ok=True)
    bits = bits_per_weight(folders[0], folders)
    models = []
    for one, folder, bpw in zip(candidates, folders, bits, strict=True):
        result = _run_tasks(one, folder, settings, options, progress)
        texts = () if options.text is None else _score_text(one, folder, folders[0], settings, options, progress)
        models.append(_model_run(one, folder, bpw, result, texts))
    return BenchReport(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=options.command,
        hardware=_hardware(),
        settings=settings,
        models=tuple(models),
    )


def _run_tasks(
    one: Candidate, folder: Folder, settings: BenchSettings, options: BenchOptions, progress: Progress
) -> WorkerResult:
    # What changes a model's answers decides where they are kept; prompts and generation settings are in their keys.
    decides = [folder.fingerprint, settings.engine, options.dtype, settings.seed, settings.model_args]
    decides += [settings.versions, options.batch_size if settings.engine == "hf" else None]
    work = options.work_dir / _work_name(one, decides)
    work.mkdir(exist_ok=True)
    request = WorkerRequest(
        model=folder.path.absolute(),
        folder=work.absolute(),
        settings=settings,
        dtype=options.dtype,
        include_path=options.include_path and options.include_path.absolute(),
        batch_size=options.batch_size,
        consent=options.consent,
    )
    write_text(work / "request.json", request.model_dump_json(indent=1))
    (work / "result.json").unlink(missing_ok=True)
    progress(one.label, "starting", 0, 0)
    _run_process(one, work, progress)
    return WorkerResult.model_validate_json((work / "result.json").read_bytes())


def _run_process(one: Candidate, work: Path, progress: Progress) -> None:
    """Start the worker and follow it to its end; what it prints goes to ``log.txt``."""
    read, write = os.pipe()
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"} | os.environ
    command = [sys.executable, "-m", "svsk_eval.bench.worker", str(work / "request.json"), str(write)]
    log = work / "log.txt"
    error: str | None = None
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=[write], env=environment
        )
    os.close(write)
    try:
        with os.fdopen(read) as told:
            for line in told:
                message = json.loads(line)
                if "error" in message:
                    error = message["error"]
                else:
                    progress(one.label, message["task"], message["done"], message["asked"])
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if error is not None:
        raise EvalError(f"{one.label}: {error}")
    if code:
        raise EvalError(f"{one.label}: its process ended with code {code}. The end of {log}:\n{_tail(log)}")


def _score_text(
    one: Candidate,
    folder: Folder,
    reference: Folder,
    settings: BenchSettings,
    options: BenchOptions,
    progress: Progress,
) -> tuple[TextScores, ...]:
    """What ``svsk eval`` says of the model, run as a command so that its memory is free afterwards."""
    assert options.text is not None
    text = options.text
    is_reference = folder.fingerprint == reference.fingerprint
    scores = []
    for engine in text.engines:
        command = ["eval", str(folder.path), "--text", str(text.text), "--engine", engine, "--dtype", options.dtype]
        command += ["--chunks", str(text.chunks), "--seq-len", str(text.seq_len)]
        if not is_reference:
            command += ["--reference", str(reference.path)]
        if engine == "vllm":
            for key, value in settings.model_args.items():
                if key not in _NOT_THE_ENGINES:
                    command += ["--engine-arg", f"{key}={json.dumps(value)}"]
        content = hashlib.sha256(_read(text.text)).hexdigest()
        decides = [folder.fingerprint, reference.fingerprint, content, command[4:], settings.versions]
        work = options.work_dir / f"{_work_name(one, decides)}-text"
        work.mkdir(exist_ok=True)
        result = work / "scores.json"
        if not result.is_file():
            progress(one.label, f"text, {engine}", 0, 0)
            with (work / "log.txt").open("wb") as output:
                done = subprocess.run(
                    [sys.executable, "-m", "svsk_offline.cli", *command, "--json", str(result)],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False,
                )  # fmt: skip
            if done.returncode:
                raise EvalError(f"{one.label}: scoring {text.text} failed:\n{_tail(work / 'log.txt')}")
        found: dict[str, Any] = json.loads(result.read_bytes())
        fields = {name: found.get(name) for name in TextScores.model_fields if name in found}
        scores.append(TextScores.model_validate(fields | {"engine": engine}))
    return tuple(scores)


_NOT_THE_ENGINES: Final = (
    "max_model_len", "max_length", "max_gen_toks", "add_bos_token", "prefix_token_id", "enable_thinking",
    "think_end_token", "chat_template_args", "truncation_side", "enable_prefix_caching",
)  # fmt: skip
"""Arguments of lm-eval's models that say how prompts are made, or that scoring a text sets itself."""


def _model_run(
    one: Candidate, folder: Folder, bpw: float | None, result: WorkerResult, texts: tuple[TextScores, ...]
) -> ModelRun:
    speeds = [task.generation for task in result.tasks if task.generation is not None]
    generation = None
    if speeds:
        generation = Generation(tokens=sum(s.tokens for s in speeds), seconds=sum(s.seconds for s in speeds))
    return ModelRun(
        label=one.label,
        model=one.name if not Path(one.name).exists() else folder.path.resolve().name,
        fingerprint=folder.fingerprint,
        method=folder.method,
        bpw=bpw,
        size_bytes=folder.size_bytes,
        dtype=result.tasks[0].dtype,
        generation=generation,
        tasks={task.run.task: task.run for task in result.tasks},
        text=texts,
    )


def _work_name(one: Candidate, decides: list[Any]) -> str:
    """Name of a model's folder: its label where it can be part of a name, and a hash of what its answers depend on."""
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', one.label)[:60]}-{digest[:12]}"


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    names = re.findall(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")).decode(), flags=re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unnamed CPU'}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvalError(f"{path}: cannot read it ({error.strerror}).") from error


def _tail(log: Path) -> str:
    with log.open(errors="replace") as handle:
        return "".join(deque(handle, _LOG_LINES)).strip()
