# SPDX-License-Identifier: Apache-2.0
"""Variants on the reference's own answers to a task: the tokens, the figures, the table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from svsk_eval.bench import reference_answers
from svsk_eval.bench.beside import score_answers
from svsk_eval.bench.options import Candidate
from svsk_eval.bench.progress import Step
from svsk_eval.bench.reference_answers import TaskAnswers, score_task
from svsk_eval.bench.runner import bench, candidate
from svsk_eval.chat.metrics import first_flip
from svsk_eval.errors import EvalError
from svsk_eval.report.analysis import analyze
from svsk_eval.report.cells import DASH
from svsk_eval.report.merge import merge_reports
from svsk_eval.report.on_reference import on_reference
from svsk_eval.report.schema import BenchReport, ReferenceAnswers
from svsk_eval.report.tables import all_tables
from svsk_eval.text.model_folder import read_folder
from svsk_eval.text.models import load_model
from tests.eval.bench.test_runner import SETTINGS, options
from tests.eval.report.reports import model_run, report, save, task_run
from tests.support.tiny_models import write_dense, write_random_svsk

ITEMS = 4

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    folder = tmp_path_factory.mktemp("models")
    write_random_svsk(write_dense(folder / "dense"), folder / "svsk")
    return [candidate(f"{name}={folder / name}") for name in ("dense", "svsk")]


def kept_answers(work: Path) -> TaskAnswers:
    (path,) = work.glob("dense-answers-*/answers-*.json")
    return TaskAnswers.model_validate_json(path.read_bytes())


def test_a_variant_is_scored_on_what_the_reference_wrote(
    models: list[Candidate], tmp_path: Path
) -> None:
    steps: list[tuple[str, Step]] = []
    asked = options(tmp_path, reference_answers=ITEMS)
    ran = bench(models, SETTINGS, asked, lambda *step: steps.append(step))
    dense, svsk = (run.tasks["mini_gen"] for run in ran.models)
    assert dense.on_reference is None
    assert all(run.tasks["mini_mc"].on_reference is None for run in ran.models)
    scored = svsk.on_reference
    assert scored is not None
    assert ("svsk", Step("the reference's answers", ITEMS, ITEMS)) in steps
    answers = kept_answers(tmp_path)
    assert scored.doc_ids == answers.doc_ids == tuple(range(ITEMS))
    tokenizer: Any = AutoTokenizer.from_pretrained(models[0].name)
    (journal,) = tmp_path.glob("dense-answers-*/journal.jsonl")
    generated = [json.loads(line)["answer"] for line in journal.read_text().splitlines()]
    texts = [answer["text"] for answer in generated if answer["kind"] == "generated"]
    assert dense.output_tokens is not None
    reference: Any = AutoModelForCausalLM.from_pretrained(models[0].name, dtype=torch.float32)
    variant: Any = load_model(models[1].name)
    for index, (prompt, ids) in enumerate(zip(answers.prompts, answers.answers, strict=True)):
        assert len(ids) == dense.output_tokens[index]
        assert any(tokenizer.decode(ids).startswith(text) for text in texts)
        with torch.no_grad():
            read = torch.tensor([[*prompt, *ids]])
            mine, theirs = (
                one(read).logits[0, len(prompt) - 1 : -1] for one in (variant, reference)
            )
        # greedy answers are the reference's likeliest tokens
        assert theirs.argmax(-1).tolist() == list(ids)
        count = scored.tokens[index]
        assert count == len(ids) - (ids[-1] == tokenizer.eos_token_id)
        figures = {name: values[index] for name, values in scored.per_item.items()}
        assert figures["first_flip"] == first_flip(mine[:count], theirs[:count])
        kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - mine.log_softmax(-1))).sum(-1)
        assert figures["kl"] == pytest.approx(float(kl[:count].mean()), abs=1e-5)
    assert sum(value or 0 for value in scored.per_item["kl"]) > 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    again = bench(models, SETTINGS, asked, lambda *_: None)
    assert again.models == ran.models
    kept = {path: when for path, when in files.items() if path.name.startswith(("scores", "ans"))}
    assert len(kept) == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_tokens_of_answers_that_were_given_before_are_kept_too(
    models: list[Candidate], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"tasks": ("mini_gen",), "limit": 3})
    bench(models[:1], settings, options(tmp_path), lambda *_: None)
    (journal,) = tmp_path.glob("*/journal.jsonl")
    before = journal.read_bytes()
    ran = bench(models, settings, options(tmp_path, reference_answers=2), lambda *_: None)
    assert journal.read_bytes() == before
    scored = ran.models[1].tasks["mini_gen"].on_reference
    assert scored is not None
    assert scored.doc_ids == (0, 1)
    # answers of a version that kept no tokens
    lines = [json.loads(line) for line in before.splitlines()]
    for line in lines:
        del line["answer"]["ids"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        EvalError,
        match=r"--reference-answers: no answer to mini_gen can be scored: those of earlier",
    ) as refused:
        bench(models, settings, options(tmp_path, reference_answers=3), lambda *_: None)
    assert str(refused.value).startswith("svsk: ")


def test_tasks_without_answers_are_refused(models: list[Candidate], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"tasks": ("mini_mc",)})
    with pytest.raises(
        EvalError, match=r"--reference-answers 5: none of mini_mc generates answers\. Leave"
    ):
        bench(models, settings, options(tmp_path, reference_answers=5), lambda *_: None)


def test_answers_that_cannot_be_read_are_named(models: list[Candidate], tmp_path: Path) -> None:
    dense, svsk = (read_folder(Path(one.name)) for one in models)
    gone = tmp_path / "answers-mini_gen.json"
    with pytest.raises(
        EvalError,
        match=r"answers-mini_gen\.json: cannot read it \(No such .*\)\. Take another --work",
    ):
        score_answers(models[1], svsk, dense, [gone], SETTINGS, options(tmp_path), lambda *_: None)


def test_long_answers_are_cut(models: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_answers, "LONGEST", 3)
    model = load_model(models[0].name)
    answers = TaskAnswers(
        task="t", doc_ids=(4,), prompts=((5, 6),), answers=((7, 8, 9, 10, 1),), left_out=2
    )
    scored = score_task(model, model, answers, ends=[1])
    assert scored.tokens == (3,)
    assert scored.left_out == 2
    assert scored.per_item["end_probability"] == (None,)
    assert scored.per_item["first_flip"] == (None,)
    assert scored.per_item["kl"] == (pytest.approx(0.0, abs=1e-7),)


def scored(fingerprint: str = "ab" * 32, **figures: tuple[float | None, ...]) -> ReferenceAnswers:
    names = ("kl", "nll", "ref_nll", "top1", "first_flip", "end_probability", "ref_end_probability")
    per_item: dict[str, tuple[float | None, ...]] = dict.fromkeys(names, (None,) * 4)
    return ReferenceAnswers(
        answers_fingerprint=fingerprint,
        doc_ids=(0, 1, 2, 3),
        tokens=(10, 10, 10, 0),
        per_item=per_item | figures,
        left_out=0,
    )


def with_answers(answers: ReferenceAnswers | None, reference: str = "dense") -> BenchReport:
    tasks = [task_run((1, 0), "a"), task_run((1, 0), "a", on_reference=answers)]
    return report([model_run(reference, tasks[:1]), model_run("w4", tasks[1:])])


def test_figures_and_table() -> None:
    answers = scored(
        kl=(0.1, 0.2, 0.3, None),
        nll=(1.0, 1.0, 1.0, None),
        ref_nll=(0.9, 0.8, 0.7, None),
        top1=(1.0, 0.9, 0.8, None),
        first_flip=(None, 7.0, 3.0, None),
        end_probability=(0.5, None, None, 0.7),
        ref_end_probability=(0.6, None, None, 0.8),
    )
    figures = on_reference(answers)
    assert figures.kl is not None
    assert figures.kl.value == pytest.approx(0.2)
    assert figures.kl.se == pytest.approx(0.1 / 3**0.5)
    assert (figures.never_flips, figures.half_flip_by) == (pytest.approx(1 / 3), 7.0)
    (table,) = (
        table
        for table in all_tables(analyze(with_answers(answers)))
        if table.title == "On the reference's answers"
    )
    assert table.groups == (
        (
            (
                "a · answers abababab",
                "w4",
                "4",
                "30",
                "0.2000 ± 0.0577",
                "+0.2000 ± 0.0577",
                "10.00 ± 5.77",
                "33.3%",
                "7",
                "0.6000 ± 0.1000",
                "0.7000 ± 0.1000",
            ),
        ),
    )
    never = on_reference(scored(first_flip=(None, None, 5.0, None)))
    assert never.half_flip_by is None
    (empty,) = (
        table
        for table in all_tables(analyze(with_answers(scored())))
        if table.title == "On the reference's answers"
    )
    assert empty.groups[0][0][4:] == (DASH, DASH, DASH, "100.0%", DASH, DASH, DASH)


def test_figures_against_another_reference_are_not_joined(tmp_path: Path) -> None:
    first = save(tmp_path / "a.json", with_answers(scored()))
    other = save(tmp_path / "b.json", with_answers(scored(), "other"))
    joined, notes = merge_reports([first, other])
    kept = {run.label: run.tasks["a"].on_reference is not None for run in joined.models}
    assert kept == {"dense": False, "w4": True, "other": False}
    assert any("on the reference's answers are against another reference" in note for note in notes)
