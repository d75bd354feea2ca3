# SPDX-License-Identifier: Apache-2.0
"""``svsk bench`` on tiny models: the report, going on after a kill, and what is refused."""

import fcntl
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svsk_eval.bench.options import BenchOptions, Candidate, TextOptions
from svsk_eval.bench.progress import Step
from svsk_eval.bench.runner import bench, candidate, package_versions
from svsk_eval.bench.work_folder import hardware
from svsk_eval.bench.worker import task_run
from svsk_eval.errors import EvalError
from svsk_eval.report.schema import BenchReport, BenchSettings
from svsk_eval.task_data import DATA_VARIABLE
from svsk_eval.text.model_folder import bits_per_weight, read_folder
from svsk_kernels.errors import SvskError
from svsk_vllm.format import Checkpoint
from tests.eval.task_data.benchmark_files import write_files
from tests.support.format_builders import edit_json
from tests.support.tiny_models import write_dense, write_random_svsk

ROOT = Path(__file__).parents[3]
TASKS = Path(__file__).parent / "bench_tasks"
SETTINGS = BenchSettings(
    tasks=("mini_gen", "mini_mc"),
    engine="hf",
    limit=None,
    seed=1234,
    gen_kwargs={},
    apply_chat_template=False,
    fewshot_as_multiturn=False,
    system_instruction=None,
    model_args={"device": "cpu"},
    data="hub",
    versions=package_versions("hf"),
)


def options(work: Path, **changes: Any) -> BenchOptions:
    base = BenchOptions(
        work_dir=work,
        dtype="auto",
        include_path=TASKS,
        batch_size=2,
        consent=False,
        text=None,
        command="svsk bench",
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    folder = tmp_path_factory.mktemp("models")
    write_random_svsk(write_dense(folder / "dense"), folder / "svsk")
    return [candidate(f"reference={folder / 'dense'}"), candidate(str(folder / "svsk"))]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def report(models: list[Candidate], work: Path) -> BenchReport:
    steps: list[tuple[str, Step]] = []
    report = bench(models, SETTINGS, options(work), lambda *step: steps.append(step))
    for run in report.models:
        mine = {step for label, step in steps if label == run.label}
        assert run.generation is not None
        # Items 18 and 19 ask what 0 and 1 do.
        common = {"items": 20, "places": 2}
        generated = Step("mini_gen", 20, 20, 2, run.generation.tokens, place=1, **common)
        chosen = Step("mini_mc", 60, 60, 60 - 18 * 3, 0, place=2, **common)
        assert {Step("starting"), generated, chosen} <= mine
    return report


def test_report(report: BenchReport, models: list[Candidate]) -> None:
    assert [run.label for run in report.models] == ["reference", "svsk"]
    assert [run.method for run in report.models] == ["none", "svsk"]
    dense, svsk = report.models
    source = Checkpoint(Path(models[1].name))
    specs = source.linears.values()
    weights = sum(spec.num_weights for spec in specs)
    assert svsk.bpw == pytest.approx(sum(spec.stored_bits for spec in specs) / weights)
    assert dense.bpw == 16
    assert dense.size_bytes == (Path(models[0].name) / "model.safetensors").stat().st_size
    assert (
        dense.dtype == svsk.dtype == "float32"
    )  # as `svsk eval` takes it on a CPU, although bfloat16 is stored
    for run in report.models:
        generated, chosen = run.tasks["mini_gen"], run.tasks["mini_mc"]
        assert list(run.tasks) == ["mini_gen", "mini_mc"]
        assert generated.doc_ids == chosen.doc_ids == tuple(range(20))
        assert generated.primary == "exact_match,none"
        assert chosen.primary == "acc_norm,none"
        assert set(chosen.scores) == {"acc,none", "acc_norm,none"}
        assert chosen.output_tokens is None
        assert generated.output_tokens is not None
        assert generated.terminated is not None
        for tokens, ended in zip(generated.output_tokens, generated.terminated, strict=True):
            assert ended == 1.0 or tokens == 12
        assert len(set(generated.item_hashes)) == len(set(chosen.item_hashes)) == 18
        assert run.generation is not None
        # Items 18 and 19 have the prompts of 0 and 1, whose answers serve for both.
        assert run.generation.tokens == sum(generated.output_tokens[:18])
        assert generated.output_tokens[18:] == generated.output_tokens[:2]
    assert dense.tasks["mini_mc"].item_hashes == svsk.tasks["mini_mc"].item_hashes
    assert dense.tasks["mini_gen"].output_tokens != svsk.tasks["mini_gen"].output_tokens


@pytest.mark.usefixtures("forked")
def test_a_finished_run_is_not_run_again(
    report: BenchReport, models: list[Candidate], work: Path
) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in work.glob("*/*")
        if "journal" in path.name or "task" in path.name
    }
    assert len(before) == 6
    steps: list[tuple[str, Step]] = []
    again = bench(models, SETTINGS, options(work), lambda *step: steps.append(step))
    assert steps == [("reference", Step("starting")), ("svsk", Step("starting"))]
    assert again.models == report.models
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("forked")
def test_a_damaged_result_is_named(
    report: BenchReport, models: list[Candidate], work: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    for path in copy.glob("*/task-*.json"):
        path.write_text("{}")
    with pytest.raises(
        EvalError,
        match=r"task-.*\.json: is damaged \(.*\)\. Delete it: the task is scored again from",
    ):
        bench(models, SETTINGS, options(copy), lambda *_: None)


def test_a_package_that_is_missed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        EvalError, match=r"The package lm_eval is not installed: pip install 'svsk-vl"
    ):
        package_versions("hf")


def test_a_processor_that_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(*_: Any, **__: Any) -> str:
        raise PermissionError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert hardware().endswith(" cores of an unnamed CPU")


def samples(mean: float, *, higher: bool) -> dict[str, Any]:
    """What lm-eval returns of a task with one metric, 3 for its only item."""
    sample = {"doc_id": 0, "filter": "none", "metrics": ["ppl"], "ppl": 3.0}
    return {
        "samples": {"a": [sample]},
        "results": {"a": {"ppl,none": mean}},
        "higher_is_better": {"a": {"ppl": higher}},
    }


@pytest.mark.parametrize(
    ("results", "metadata", "message"),
    [
        (
            samples(20.0, higher=False),
            None,
            "a: its metrics cannot be compared item by item, being no mean over items: ppl,none. L",
        ),
        (
            samples(3.0, higher=True),
            {"primary": "acc,none"},
            "a: its primary metric acc,none cannot be compared item by item, being no mean over",
        ),
        (
            samples(3.0, higher=False),
            None,
            "a: its metric ppl,none is better when it is lower, which reports cannot show",
        ),
    ],
)
def test_metrics_that_reports_cannot_show(
    results: dict[str, Any], metadata: dict[str, str] | None, message: str
) -> None:
    task = SimpleNamespace(config=SimpleNamespace(metadata=metadata))
    with pytest.raises(EvalError, match=message):
        task_run("a", task, results, None)


@pytest.mark.usefixtures("forked")
def test_fewer_items_are_taken_from_the_same_answers(
    report: BenchReport, models: list[Candidate], work: Path
) -> None:
    sizes = {path: path.stat().st_size for path in work.glob("*/journal.jsonl")}
    changed = SETTINGS.model_copy(update={"limit": 5, "tasks": ("mini_mc",)})
    shorter = bench(models[1:], changed, options(work), lambda *_: None)
    assert (
        shorter.models[0].tasks["mini_mc"].scores["acc,none"]
        == (report.models[1].tasks["mini_mc"].scores["acc,none"][:5])
    )
    assert {path: path.stat().st_size for path in sizes} == sizes


def lines(journal: Path) -> list[bytes]:
    return journal.read_bytes().splitlines() if journal.exists() else []


@pytest.mark.usefixtures("forked")
def test_killed_runs_go_on(
    report: BenchReport, models: list[Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recording(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recording)
    kept: list[bytes] = []
    for task, least in (("mini_gen", 3), ("mini_mc", 40)):

        def kill(label: str, step: Step, task: str = task, least: int = least) -> None:
            if (label, step.what) == ("svsk", task) and step.done >= least:
                started[-1].kill()

        with pytest.raises(EvalError, match=r"svsk: its process failed \(ended by SIGKILL"):
            bench(models[1:], SETTINGS, options(tmp_path), kill)
        (journal,) = tmp_path.glob("svsk-*/journal.jsonl")
        answers = lines(journal)
        assert answers[: max(len(kept) - 1, 0)] == kept[:-1]
        assert len(kept) < len(answers) < 18 + 18 * 3
        kept = answers
    last = bench(models[1:], SETTINGS, options(tmp_path), lambda *_: None).models[0]
    keys = [json.loads(line)["key"] for line in lines(journal)]
    assert lines(journal)[: len(kept) - 1] == kept[:-1]
    assert len(keys) == len(set(keys)) == 18 + 18 * 3
    assert last.tasks == report.models[1].tasks


def test_a_worker_does_not_outlive_its_parent(models: list[Candidate], tmp_path: Path) -> None:
    script = (
        "import sys; from tests.eval.bench.test_runner import *; "
        "bench([candidate(sys.argv[1])], SETTINGS, options(Path(sys.argv[2])), lambda *_: None)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, f"svsk={models[1].name}", str(tmp_path)], cwd=ROOT
    )
    end = time.monotonic() + 120
    while not any(lines(journal) for journal in tmp_path.glob("svsk-*/journal.jsonl")):
        assert parent.poll() is None, "the run ended before it was to be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    (journal,) = tmp_path.glob("svsk-*/journal.jsonl")
    with journal.open("rb") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # the worker still has it
                assert time.monotonic() < end
                time.sleep(0.05)
    assert len(lines(journal)) < 18 + 18 * 3


@pytest.mark.usefixtures("forked")
def test_what_is_refused(
    models: list[Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(
        *chosen: Candidate, tasks: tuple[str, ...] = ("mini_mc",), **changes: Any
    ) -> BenchReport:
        settings = SETTINGS.model_copy(update={"tasks": tasks})
        return bench(chosen, settings, options(tmp_path / "work", **changes), lambda *_: None)

    with pytest.raises(EvalError, match="svsk: two models have this label"):
        run(models[0], models[1], models[1])
    with pytest.raises(
        EvalError, match=r"reference: --tasks mini_mc,mini_none: lm-eval knows no mini_none\."
    ):
        run(models[0], tasks=("mini_mc", "mini_none"))
    with pytest.raises(
        EvalError, match="mini_code runs code that the model has written, and not in our sandbox"
    ):
        run(models[0], tasks=("mini_code",))
    monkeypatch.setenv(DATA_VARIABLE, str(write_files(tmp_path / "data")))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # which is lm-eval's; ours is asked for too
    message = (
        r"svsk_humaneval runs code that the model has written\. It runs in a sandbox, which is no"
    )
    with pytest.raises(EvalError, match=message):
        run(models[0], tasks=("svsk_humaneval",))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(EvalError, match=r"reference: .*short\.txt: \d+ tokens are 0 chunks of 64"):
        run(models[0], text=TextOptions(tmp_path / "short.txt", 2, 64, ("hf",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SvskError, match=r"empty: has no config\.json"):
        run(Candidate("x", str(tmp_path / "empty")))
    broken = write_dense(tmp_path / "broken")
    edit_json(broken / "config.json", lambda config: config.update(hidden_size=64))
    with pytest.raises(
        EvalError,
        match=r"(?s)broken: its process failed \(exit code 1\)\. The end of .*log\.txt:.*size",
    ):
        run(candidate(str(broken)))
    assert candidate("a=b/c") == Candidate("a", "b/c")
    for text in ("", "=x", "x=", "a= "):
        with pytest.raises(EvalError, match="expected MODEL or LABEL=MODEL"):
            candidate(text)


def test_bits_of_other_formats(models: list[Candidate], tmp_path: Path) -> None:
    dense, svsk = (read_folder(Path(one.name)) for one in models)
    assert bits_per_weight(dense, [dense, dense]) == [None, None]
    other = read_folder(write_dense(tmp_path / "other", seed=1))
    assert other.fingerprint != dense.fingerprint
    bits = bits_per_weight(dense, [dense, svsk, other])
    assert bits[0] == bits[2] == 16
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "config.json").write_text("{}")
    (gguf / "model.gguf").write_bytes(b"GGUF")
    assert bits_per_weight(dense, [dense, svsk, read_folder(gguf)])[2] is None
