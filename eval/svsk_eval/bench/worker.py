# SPDX-License-Identifier: Apache-2.0
"""One model on the tasks, in a process of its own.

``python -m svsk_eval.bench.worker REQUEST PIPE``.

Every answer goes to ``journal.jsonl`` in the work folder as it is finished, every finished task to
``task-*.json``. A model whose tasks are all finished is not loaded.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from svsk_eval.bench.fingerprint import source_hash
from svsk_eval.bench.journal import Journal
from svsk_eval.errors import EvalError
from svsk_eval.processes import die_with_parent
from svsk_eval.report.schema import BenchSettings, Generation, TaskRun
from svsk_eval.task_data import task_manager, tasks_folder
from svsk_eval.text.engine_args import served_dtype
from svsk_eval.text.scoring import resolve_dtype
from svsk_offline.storage.atomic import write_text

__all__ = ["TaskResult", "WorkerRequest", "WorkerResult", "run_worker", "task_run"]

_FAILED: Final = 3

TaskProgress = Callable[[str, int, int], None]
"""Called with a task's name and the numbers of its requests that are done and that are known."""


class WorkerRequest(BaseModel):
    """What a worker is to do.

    Attributes:
        model: folder.
        folder: of its own, for journal, tasks and result.
        settings: of the run.
        dtype: of the arithmetic, torch's name, or ``auto`` as ``svsk eval`` takes it with the same
            engine.
        include_path: folder of further tasks, or None.
        batch_size: prompts at a time with ``hf``.
        consent: whether code that the model writes may be run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: Path
    folder: Path
    settings: BenchSettings
    dtype: str
    include_path: Path | None
    batch_size: int
    consent: bool


class TaskResult(BaseModel):
    """A finished task.

    Attributes:
        run: its scores.
        dtype: of the arithmetic.
        generation: speed; None if no answer was generated anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: TaskRun
    dtype: str
    generation: Generation | None


class WorkerResult(BaseModel):
    """All tasks of a model, in the order of their names' expansion."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tasks: tuple[TaskResult, ...]


def run_worker(
    request: WorkerRequest, progress: TaskProgress, note: Callable[[str], None]
) -> WorkerResult:
    """Run what is not finished yet, and collect all tasks.

    Args:
        request: what to do.
        progress: see :data:`TaskProgress`.
        note: called with what a user should know.

    Raises:
        EvalError: a task or the model cannot be used.
    """
    tasks = _load_tasks(request)
    sources = _sources(request)
    files = {
        name: request.folder / f"task-{name}-{_task_key(request, task, sources)}.json"
        for name, task in tasks.items()
    }
    missing = [name for name in tasks if not files[name].is_file()]
    if missing:
        with Journal(request.folder / "journal.jsonl") as journal:
            current = [""]
            model = _load_model(
                request, journal, lambda done, asked: progress(current[0], done, asked)
            )
            for name in missing:
                current[0] = name
                cut = model.cut_prompts
                result = _run_task(request, model, name, tasks[name])
                write_text(files[name], result.model_dump_json(indent=1))
                if model.cut_prompts > cut:
                    note(
                        f"{name}: {model.cut_prompts - cut} prompts were cut to fit the model's"
                        " context."
                    )
    return WorkerResult(tasks=tuple(_read_result(files[name]) for name in tasks))


def _load_tasks(request: WorkerRequest) -> dict[str, Any]:
    """lm-eval's task objects by name, groups expanded, with the overrides of the run."""
    from lm_eval.tasks import TaskManager

    ours = tasks_folder()
    folders = [ours, *([request.include_path] if request.include_path else [])]
    metadata = {"pretrained": str(request.model), **request.settings.model_args}
    asked = list(request.settings.tasks)
    sandboxed = set(task_manager(include_defaults=False).all_tasks)
    # Reading all of lm-eval's own tasks takes seconds: only if one is wanted, or may be in a group
    # of the user's.
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if not {*asked} <= sandboxed | {*manager.all_subtasks}:
        manager = TaskManager(include_path=folders, metadata=metadata)
    unknown = [name for name in asked if not manager.match_tasks([name])]
    if unknown:
        raise EvalError(
            f"--tasks {','.join(asked)}: lm-eval knows no {', '.join(unknown)}. `lm_eval ls tasks"
            f" --include_path {ours}` lists all; --include-path adds a folder of your own."
        )
    names = list(
        dict.fromkeys(match for name in asked for match in sorted(manager.match_tasks([name])))
    )
    _seed(request.settings.seed)  # some tasks draw their items at random when they are loaded
    tasks: dict[str, Any] = manager.load(names)["tasks"]
    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until" and request.settings.gen_kwargs:
            task.set_config(
                key="generation_kwargs", value=dict(request.settings.gen_kwargs), update=True
            )
        if getattr(task, "UNSAFE_CODE", False) and name not in sandboxed:
            raise EvalError(
                f"{name} runs code that the model has written, and not in our sandbox. Take"
                " svsk_humaneval, svsk_mbpp or svsk_code_instruct, or use lm_eval's own command."
            )
        if getattr(task, "UNSAFE_CODE", False) and not request.consent:
            raise EvalError(
                f"{name} runs code that the model has written. It runs in a sandbox, which is no"
                " guarantee: if you agree, add --confirm-run-unsafe-code."
            )
    return tasks


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _sources(request: WorkerRequest) -> str:
    """A hash of the files that make prompts and scores of items.

    Lm-eval's own are known by its version.
    """
    package = Path(__file__).parents[1]
    folders = [tasks_folder(), package / "task_data", package / "sandbox", package / "bench"]
    if request.include_path:
        folders.append(request.include_path)
    return source_hash(folders)


def _task_key(request: WorkerRequest, task: Any, sources: str) -> str:
    """What a task's scores depend on besides the model, which has a folder of its own, as a short hash."""
    settings = request.settings
    hashed = hashlib.sha256(sources.encode())
    own = settings.model_dump(mode="json", exclude={"tasks"}) | {
        "dtype": request.dtype,
        "batch": request.batch_size,
    }
    hashed.update(json.dumps([own, task.dump_config()], sort_keys=True, default=_plain).encode())
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else None
    for doc in (*(doc for _, doc in task.doc_iterator(limit=settings.limit)), *(examples or ())):
        hashed.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return hashed.hexdigest()[:16]


def _plain(value: Any) -> str:
    """A configuration's value that is not JSON.

    Functions by name, because their addresses change.
    """
    return str(getattr(value, "__name__", value))


def _load_model(
    request: WorkerRequest, journal: Journal, progress: Callable[[int, int], None]
) -> Any:
    from svsk_eval.bench.engines import hf_model, vllm_model

    settings = request.settings
    chosen = {"pretrained": str(request.model), **settings.model_args}
    if settings.engine == "vllm":
        own = {"seed": settings.seed, "batch_size": "auto", "dtype": served_dtype(request.dtype)}
        return vllm_model(own | chosen, journal, progress)
    device = str(chosen.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = resolve_dtype(None if request.dtype == "auto" else request.dtype, torch.device(device))
    own = {
        "batch_size": request.batch_size,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return hf_model(own | chosen, journal, progress, settings.seed)


def _run_task(request: WorkerRequest, model: Any, name: str, task: Any) -> TaskResult:
    import lm_eval
    from lm_eval.tasks import TaskManager

    settings = request.settings
    tokens, seconds = model.clock.tokens, model.clock.seconds
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        # Only names are looked up in it, and this task is loaded already; reading all of lm-eval's
        # takes seconds.
        task_manager=TaskManager(include_defaults=False),
        limit=settings.limit,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn,
        system_instruction=settings.system_instruction,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
        confirm_run_unsafe_code=request.consent,
    )
    new = model.clock.tokens - tokens
    return TaskResult(
        run=task_run(name, task, found, model),
        dtype=_dtype(model),
        generation=Generation(tokens=new, seconds=model.clock.seconds - seconds) if new else None,
    )


def task_run(name: str, task: Any, found: Mapping[str, Any], model: Any) -> TaskRun:
    """The scores per item of what ``simple_evaluate`` returned for one task.

    Args:
        name: of the task.
        task: lm-eval's object.
        found: what ``simple_evaluate`` returned.
        model: the :class:`svsk_eval.bench.engines.JournaledModel` that answered.

    Raises:
        EvalError: the task has no metric that is a mean over items, or its primary metric is not,
            or is not better when it is higher.
    """
    samples: dict[str, dict[int, Mapping[str, Any]]] = {}
    for sample in found["samples"][name]:
        samples.setdefault(sample["filter"], {})[sample["doc_id"]] = sample
    first = next(iter(samples.values()))
    doc_ids = sorted(first)
    scores = {}
    for kind, by_id in samples.items():
        for metric in first[doc_ids[0]]["metrics"]:
            values = [by_id[index][metric] for index in doc_ids]
            if all(isinstance(value, (bool, int, float, np.number)) for value in values):
                mean = found["results"][name].get(f"{metric},{kind}")
                # Others, such as perplexities, are no means over items, and cannot be compared item
                # by item.
                if isinstance(mean, (int, float)) and abs(mean - float(np.mean(values))) < 1e-6:
                    scores[f"{metric},{kind}"] = tuple(float(value) for value in values)
    wanted = (task.config.metadata or {}).get("primary")
    primary = wanted or next(iter(scores), None)
    if primary not in scores:
        raise EvalError(
            f"{name}: its {'primary metric ' + wanted if wanted else 'metrics'} cannot be compared"
            f" item by item, being no mean over items: {', '.join(found['results'][name])}. Leave"
            " the task out, or name another metric as `metadata: {primary: METRIC,FILTER}` in"
            " its file."
        )
    if not found["higher_is_better"][name].get(primary.partition(",")[0], True):
        raise EvalError(
            f"{name}: its metric {primary} is better when it is lower, which reports cannot show."
        )
    generates = task.get_config("output_type") == "generate_until"
    answers = _answers(model, [first[index] for index in doc_ids]) if generates else []
    return TaskRun(
        task=name,
        version=str(found["versions"].get(name)),
        output_type=str(task.get_config("output_type")),
        num_fewshot=int(found["n-shot"].get(name) or 0),
        primary=primary,
        doc_ids=tuple(doc_ids),
        item_hashes=tuple(_item_hash(first[index]) for index in doc_ids),
        scores=scores,
        output_tokens=(
            tuple(float(np.mean([one.tokens for one in item])) for item in answers)
            if generates
            else None
        ),
        terminated=(
            tuple(float(np.mean([one.stopped for one in item])) for item in answers)
            if generates
            else None
        ),
    )


def _answers(model: Any, samples: list[Mapping[str, Any]]) -> list[list[Any]]:
    """The generated answers of each item: one request per item, as often as the task repeats it."""
    requests, counts = [], []
    for sample in samples:
        repeats = len(sample["resps"][0])
        requests += [sample["arguments"][0]] * repeats
        counts.append(repeats)
    answers = iter(model.generated(requests))
    return [[next(answers) for _ in range(count)] for count in counts]


def _item_hash(sample: Mapping[str, Any]) -> str:
    """An item's prompts, with the choices for tasks that have some, and its target."""
    texts = [
        [part for part in arguments if isinstance(part, str)] for arguments in sample["arguments"]
    ]
    return hashlib.sha256(json.dumps([texts, str(sample["target"])]).encode()).hexdigest()[:16]


def _dtype(model: Any) -> str:
    engine = getattr(model.model, "llm_engine", None)
    return str(engine.model_config.dtype if engine else model.model.dtype).removeprefix("torch.")


def _read_result(path: Path) -> TaskResult:
    try:
        return TaskResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvalError(
            f"{path}: is damaged ({error}). Delete it: the task is scored again from its answers."
        ) from error


def main(request_file: str, pipe: str) -> None:
    """Run a request.

    Tell the parent of progress through a pipe, and leave the result in the work folder.
    """
    die_with_parent()
    request = WorkerRequest.model_validate_json(Path(request_file).read_bytes())
    if request.consent:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")  # the parent shows the progress
    with os.fdopen(int(pipe), "w", buffering=1) as parent:

        def tell(**values: Any) -> None:
            parent.write(json.dumps(values) + "\n")

        try:
            result = run_worker(
                request,
                lambda task, done, asked: tell(task=task, done=done, asked=asked),
                lambda text: tell(note=text),
            )
        except EvalError as error:
            tell(error=str(error))
            sys.exit(_FAILED)
        write_text(request.folder / "result.json", result.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
