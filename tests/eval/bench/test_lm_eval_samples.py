# SPDX-License-Identifier: Apache-2.0
"""``svsk bench`` gives the scores of lm-eval's own command, item by item."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svsk_eval.bench.runner import bench, candidate
from svsk_eval.errors import EvalError
from svsk_eval.report.lm_eval_samples import compare_with_samples, main
from svsk_eval.task_data import tasks_folder
from tests.eval.bench.test_runner import SETTINGS, options
from tests.eval.report.reports import model_run, report, save, task_run
from tests.support.tiny_models import write_dense

TASKS = ("svsk_smoke_copy", "svsk_smoke_facts")
LIMIT = 6


def write_samples(path: Path, scores: dict[int, float], kind: str = "none") -> Path:
    lines = [
        {"doc_id": item, "filter": kind, "metrics": ["exact_match"], "exact_match": value}
        for item, value in scores.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_same_as_lm_evals_own_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_dense(tmp_path / "dense")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={dense},dtype=float32", "--batch_size", "2"]
    command += ["--tasks", *TASKS, "--include_path", str(tasks_folder()), "--limit", str(LIMIT)]
    command += ["--seed", "1234", "--gen_kwargs", "max_gen_toks=12"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = sorted((tmp_path / "out").glob("*/samples_*.jsonl"))
    assert len(samples) == 2
    settings = SETTINGS.model_copy(
        update={"tasks": TASKS, "limit": LIMIT, "gen_kwargs": {"max_gen_toks": 12}}
    )
    ran = bench([candidate(f"x={dense}")], settings, options(tmp_path / "work"), lambda *_: None)
    found = compare_with_samples(ran, "x", samples)
    assert {one.task for one in found} == set(TASKS)
    assert {one.items for one in found} == {LIMIT}
    assert not any(one.different for one in found)
    kinds = {task.output_type for task in ran.models[0].tasks.values()}
    assert kinds == {"generate_until", "multiple_choice"}
    # Scores of a random model say little: its answers and likelihoods are the same, too.
    (journal,) = tmp_path.glob("work/*/journal.jsonl")
    answers = [json.loads(line)["answer"] for line in journal.read_text().splitlines()]
    theirs = [json.loads(line) for path in samples for line in path.read_text().split("\n") if line]
    texts = {answer["text"] for answer in answers if answer["kind"] == "generated"}
    assert {sample["resps"][0][0] for sample in theirs if "copy" in sample_task(sample)} == texts
    saved = save(tmp_path / "report.json", ran)
    assert main([str(saved), "x", *map(str, samples)]) == 0
    assert f"svsk_smoke_copy exact_match,strip: {LIMIT} of {LIMIT} items the same" in (
        capsys.readouterr().out
    )


def sample_task(sample: dict[str, object]) -> str:
    """A sample does not name its task: those of generation have texts as responses."""
    responses = sample["resps"]
    assert isinstance(responses, list)
    return "copy" if isinstance(responses[0][0], str) else "facts"


def test_differences_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = report([model_run("x", [task_run((1, 0, 1), "a_b")])])
    path = tmp_path / "samples_a_b_2026-11-29T19-00-00.123456.jsonl"
    write_samples(path, {0: 1.0, 1: 1.0, 2: 1.0})
    (one,) = compare_with_samples(ran, "x", [path])
    assert (one.items, one.different) == (3, (1,))
    assert main([str(save(tmp_path / "r.json", ran)), "x", str(path)]) == 1
    shown = "a_b exact_match,none: 2 of 3 items the same, different: 1 (items 1)"
    assert shown in capsys.readouterr().out


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = report([model_run("x", [task_run((1, 0), "a")])])
    date = "2026-11-29T19-00-00.123456.jsonl"
    good = write_samples(tmp_path / f"samples_a_{date}", {0: 1.0, 1: 0.0})
    with pytest.raises(EvalError, match="no model 'y' in the report, expected x"):
        compare_with_samples(ran, "y", [good])
    other = write_samples(tmp_path / f"samples_b_{date}", {0: 1.0})
    with pytest.raises(EvalError, match="the report has no task b, expected a"):
        compare_with_samples(ran, "x", [other])
    with pytest.raises(EvalError, match=r"expected a name like samples_TASK_DATE\.jsonl"):
        compare_with_samples(ran, "x", [tmp_path / "results.json"])
    with pytest.raises(
        EvalError, match=r"absent/.*: cannot read these samples \(No such file or directory\)"
    ):
        compare_with_samples(ran, "x", [tmp_path / f"absent/samples_a_{date}"])
    write_samples(good, {0: 1.0, 1: 0.0, 2: 0.0})
    with pytest.raises(EvalError, match=r"has 3 items, and the report 2, 1 of them not in both"):
        compare_with_samples(ran, "x", [good])
    write_samples(good, {0: 1.0, 1: 0.0}, "strict")
    with pytest.raises(EvalError, match="has exact_match,strict, expected exact_match,none"):
        compare_with_samples(ran, "x", [good])
    good.write_text("{}\n")
    with pytest.raises(EvalError, match="not a file of samples"):
        compare_with_samples(ran, "x", [good])
    assert main(["one"]) == 1
    assert "Expected REPORT LABEL SAMPLES...: a file, a model in it" in capsys.readouterr().out
