# SPDX-License-Identifier: Apache-2.0
"""One model on the tasks, in a process of its own: ``python -m svsk_eval.bench.worker``.

Every answer goes to ``journal.jsonl`` in the work folder as it is finished,
every finished task to ``task-*.json``. A model whose tasks are all finished is not loaded.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from transformers import set_seed

from svsk_eval.bench.fingerprint import source_hash, task_sources
from svsk_eval.bench.journal import JOURNAL, Journal
from svsk_eval.bench.journaled_model import AnswerProgress
from svsk_eval.bench.progress import Step
from svsk_eval.bench.reference_answers import collect
from svsk_eval.bench.repeats import check_repeats, mean_of_runs
from svsk_eval.errors import EvalError
from svsk_eval.processes import answer_request
from svsk_eval.report.schema import BenchSettings, Generation, TaskRun
from svsk_eval.task_data import task_manager, tasks_folder
from svsk_eval.text.engine_args import served_dtype
from svsk_eval.text.models import resolve_dtype
from svsk_offline.storage.atomic import write_text

__all__ = ["TaskResult", "WorkerRequest", "run_worker", "task_run"]

TaskProgress = Callable[[Step], None]
"""Called with how far a task is."""


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
        earlier: models of the run before this one that are the same: its answers are drawn with
            other seeds, so that the two show what chance does.
        reference_answers: items of each task that generates whose answers are kept as tokens.
        merged: journals of other machines whose answers are taken where there are none, each with
            what was different there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: Path
    folder: Path
    settings: BenchSettings
    dtype: str
    include_path: Path | None
    batch_size: int
    consent: bool
    earlier: int = 0
    reference_answers: int = 0
    merged: dict[str, str] = {}


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


def run_worker(
    request: WorkerRequest, progress: TaskProgress, note: Callable[[str], None]
) -> tuple[list[Path], list[Path]]:
    """Run what is not finished yet.

    Args:
        request: what to do.
        progress: see :data:`TaskProgress`.
        note: called with what a user should know.

    Returns:
        Files that hold a :class:`TaskResult` each, in the order of the tasks, groups expanded; and
        files of :class:`svsk_eval.bench.reference_answers.TaskAnswers`, if they are asked for.

    Raises:
        EvalError: a task or the model cannot be used.
    """
    tasks = _load_tasks(request)
    sources = source_hash(task_sources(request.include_path))
    keys = {
        name: f"{name}-{_task_key(request, task, sources)}.json" for name, task in tasks.items()
    }
    files = {name: request.folder / f"task-{key}" for name, key in keys.items()}
    answers = {
        name: request.folder / f"answers-{request.reference_answers}-{key}"
        for name, key in keys.items()
        if request.reference_answers and _generates(tasks[name])
    }
    missing = [
        name
        for name in tasks
        if not files[name].is_file() or (name in answers and not answers[name].is_file())
    ]
    if missing:
        with Journal(request.folder / JOURNAL) as journal:
            for other, origin in request.merged.items():
                journal.adopt(Path(other), origin)
            current: dict[str, Any] = {"what": missing[0]}
            model = _load_model(
                request, journal, lambda count: progress(Step(**current, **vars(count)))
            )
            for name in missing:
                current.update(
                    what=name,
                    items=min(len(tasks[name].eval_docs), request.settings.limit or sys.maxsize),
                    place=list(tasks).index(name) + 1,
                    places=len(tasks),
                )
                model.begin_task(request.settings.repeats if _generates(tasks[name]) else 1)
                cut = model.cut_prompts
                result, samples = _run_task(request, model, name, tasks[name])
                if name in answers:
                    first = samples[: request.reference_answers]
                    kept = collect(name, model, first, int(model.max_length))
                    write_text(answers[name], kept.model_dump_json())
                write_text(files[name], result.model_dump_json(indent=1))
                if model.cut_prompts > cut:
                    note(
                        f"{name}: {model.cut_prompts - cut} prompts were"
                        " cut to fit the model's context."
                    )
    return list(files.values()), list(answers.values())


def _load_tasks(request: WorkerRequest) -> dict[str, Any]:
    """lm-eval's task objects by name, groups expanded, with the overrides of the run."""
    from lm_eval.tasks import TaskManager

    ours = tasks_folder()
    folders = [ours, *([request.include_path] if request.include_path else [])]
    metadata = {"pretrained": str(request.model), **request.settings.model_args}
    names = list(request.settings.tasks)
    sandboxed = set(task_manager(include_defaults=False).all_tasks)
    # Reading all of lm-eval's own tasks takes seconds: only if one is wanted, or may be in a group
    # of the user's.
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if not {*names} <= sandboxed | {*manager.all_subtasks}:
        manager = TaskManager(include_path=folders, metadata=metadata)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise EvalError(
            f"--tasks {','.join(names)}: lm-eval knows no {', '.join(unknown)}. `lm_eval ls tasks"
            f" --include_path {ours}` lists all; --include-path adds a folder of your own."
        )
    matches = [match for name in names for match in sorted(manager.match_tasks([name]))]
    set_seed(request.settings.seed)  # some tasks draw their items at random when they are loaded
    tasks: dict[str, Any] = manager.load(list(dict.fromkeys(matches)))["tasks"]
    for name, task in tasks.items():
        if _generates(task) and request.settings.gen_kwargs:
            task.set_config(
                key="generation_kwargs", value=dict(request.settings.gen_kwargs), update=True
            )
        if _generates(task):
            check_repeats(name, task, request.settings.repeats)
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
    for option, asked in (
        (f"--repeats {request.settings.repeats}", request.settings.repeats > 1),
        (f"--reference-answers {request.reference_answers}", request.reference_answers > 0),
    ):
        if asked and not any(map(_generates, tasks.values())):
            raise EvalError(
                f"{option}: none of {', '.join(tasks)} generates answers. Leave it out, or add a"
                " task that does."
            )
    return tasks


def _generates(task: Any) -> bool:
    return bool(task.get_config("output_type") == "generate_until")


def _task_key(request: WorkerRequest, task: Any, sources: str) -> str:
    """What a task's scores depend on besides the model, as a short hash."""
    settings = request.settings
    hashed = hashlib.sha256(sources.encode())
    decides = settings.model_dump(mode="json", exclude={"tasks"}) | {
        "dtype": request.dtype,
        "batch": request.batch_size,
    }
    hashed.update(
        json.dumps([decides, task.dump_config()], sort_keys=True, default=_plain).encode()
    )
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else None
    for doc in (*(doc for _, doc in task.doc_iterator(limit=settings.limit)), *(examples or ())):
        hashed.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return hashed.hexdigest()[:16]


def _plain(value: Any) -> str:
    """A configuration's value that is not JSON.

    Functions by name, because their addresses change.
    """
    return str(getattr(value, "__name__", value))


def _load_model(request: WorkerRequest, journal: Journal, progress: AnswerProgress) -> Any:
    from svsk_eval.bench.engines import hf_model, vllm_model

    settings = request.settings
    chosen = {"pretrained": str(request.model), **settings.model_args}
    if settings.engine == "vllm":
        defaults = {
            "seed": settings.seed + request.earlier,
            "batch_size": "auto",
            "dtype": served_dtype(request.dtype),
        }
        return vllm_model(defaults | chosen, journal, progress)
    device = str(chosen.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = resolve_dtype(None if request.dtype == "auto" else request.dtype, torch.device(device))
    defaults = {
        "batch_size": request.batch_size,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return hf_model(defaults | chosen, journal, progress, settings.seed + request.earlier)


def _run_task(
    request: WorkerRequest, model: Any, name: str, task: Any
) -> tuple[TaskResult, list[Mapping[str, Any]]]:
    """A task's result, and lm-eval's samples of its items with the first answers to them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    settings = request.settings
    tokens, seconds = model.new_tokens, model.seconds
    evaluate = partial(
        lm_eval.simple_evaluate,
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
    runs, samples = [], {}
    for repeat in range(model.repeats):
        model.repeat = repeat
        results = evaluate()
        runs.append(task_run(name, task, results, model))
        if repeat == 0:
            samples = {sample["doc_id"]: sample for sample in results["samples"][name]}
    model.repeat = 0
    new = model.new_tokens - tokens
    result = TaskResult(
        run=mean_of_runs(runs).model_copy(update={"elsewhere": dict(model.elsewhere)}),
        dtype=_dtype(model),
        generation=Generation(tokens=new, seconds=model.seconds - seconds) if new else None,
    )
    return result, [samples[index] for index in sorted(samples)]


def task_run(name: str, task: Any, results: Mapping[str, Any], model: Any) -> TaskRun:
    """The scores per item of what ``simple_evaluate`` returned for one task.

    Args:
        name: of the task.
        task: lm-eval's object.
        results: what ``simple_evaluate`` returned.
        model: the :class:`svsk_eval.bench.journaled_model.JournaledModel` that answered.

    Raises:
        EvalError: the task has no metric that is a mean over items, or its primary metric is not,
            or is not better when it is higher.
    """
    samples: dict[str, dict[int, Mapping[str, Any]]] = {}
    for sample in results["samples"][name]:
        samples.setdefault(sample["filter"], {})[sample["doc_id"]] = sample
    first = next(iter(samples.values()))
    doc_ids = sorted(first)
    scores = {}
    for kind, by_id in samples.items():
        for metric in first[doc_ids[0]]["metrics"]:
            values = [by_id[index][metric] for index in doc_ids]
            if all(isinstance(value, (bool, int, float, np.number)) for value in values):
                mean = results["results"][name].get(f"{metric},{kind}")
                # Others, such as perplexities, are no means over items, and cannot be compared item
                # by item.
                if isinstance(mean, (int, float)) and abs(mean - float(np.mean(values))) < 1e-6:
                    scores[f"{metric},{kind}"] = tuple(float(value) for value in values)
    named = (task.config.metadata or {}).get("primary")
    primary = named or next(iter(scores), None)
    if primary not in scores:
        raise EvalError(
            f"{name}: its {'primary metric ' + named if named else 'metrics'} cannot be compared"
            f" item by item, being no mean over items: {', '.join(results['results'][name])}. Leave"
            " the task out, or name another metric as `metadata: {primary: METRIC,FILTER}` in"
            " its file."
        )
    if not results["higher_is_better"][name].get(primary.partition(",")[0], True):
        raise EvalError(
            f"{name}: its metric {primary} is better when it is lower, which reports cannot show."
        )
    generates = _generates(task)
    answers = _answers(model, [first[index] for index in doc_ids]) if generates else []

    def means(name: str) -> tuple[float, ...]:
        return tuple(float(np.mean([getattr(one, name) for one in item])) for item in answers)

    return TaskRun(
        task=name,
        version=str(results["versions"].get(name)),
        output_type=str(task.get_config("output_type")),
        num_fewshot=int(results["n-shot"].get(name) or 0),
        primary=primary,
        doc_ids=tuple(doc_ids),
        item_hashes=tuple(_item_hash(first[index]) for index in doc_ids),
        scores=scores,
        output_tokens=means("tokens") if generates else None,
        terminated=means("stopped") if generates else None,
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


def main(request_file: Path, report: Callable[..., None]) -> None:
    """Run a request; ``report`` gets the progress, notes, and in the end the files of results."""
    request = WorkerRequest.model_validate_json(request_file.read_bytes())
    if request.consent:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    files, answers = run_worker(
        request,
        lambda step: report(step=vars(step)),
        lambda text: report(note=text),
    )
    report(files=[str(path) for path in files], answers=[str(path) for path in answers])


if __name__ == "__main__":
    answer_request(main)
