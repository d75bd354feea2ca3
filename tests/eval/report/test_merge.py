# SPDX-License-Identifier: Apache-2.0
"""Comparisons of ``svsk bench``: what pairs with what, files put together, and the gate."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from svsk_eval.errors import EvalError
from svsk_eval.report.analysis import analyze
from svsk_eval.report.merge import (
    below_minimum,
    compare_and_print,
    compare_reports,
    is_bench_report,
    merge_reports,
)
from svsk_eval.report.paired_statistics import holm, mcnemar_midp
from svsk_eval.report.pooling import pooled
from svsk_eval.report.schema import ModelRun, TextScores, load_report
from tests.eval.report.reports import model_run, report, save, task_run

RIGHT = (1, 1, 1, 1, 0, 0, 1, 1)
WORSE = (1, 0, 0, 1, 0, 1, 1, 0)


def model(
    label: str,
    scores: tuple[float, ...] = RIGHT,
    second: tuple[float, ...] = (0.5, 0.25),
    **fields: Any,
) -> ModelRun:
    """A model on two tasks: ``a`` of right and wrong answers, and ``b``."""
    generated = {
        "output_tokens": tuple(10.0 + score for score in scores),
        "terminated": (1.0,) * len(scores),
    }
    return model_run(label, [task_run(scores, "a", **generated), task_run(second, "b")], **fields)


def text(**fields: Any) -> TextScores:
    return TextScores(
        engine="hf", text_fingerprint="0f", tokens=62, chunks=2, seq_len=32, nll=2.5, **fields
    )


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return save(tmp_path / "first.json", report([model("dense"), model("w4", WORSE)]))


def test_every_figure_of_a_variant() -> None:
    analysis = analyze(report([model("dense"), model("w4", WORSE), model("w8", second=(0.5, 0.5))]))
    assert (analysis.reference.label, analysis.tasks) == ("dense", ("a", "b"))
    w4, w8 = analysis.variants
    score = w4.tasks[0].score
    assert (w4.label, w4.tasks[0].task, score.n, score.lost, score.gained) == ("w4", "a", 8, 3, 1)
    assert score.p == mcnemar_midp(3, 1)
    assert w8.tasks[1].score.difference == 0.125
    raw = [task.score.p for variant in analysis.variants for task in variant.tasks]
    assert [task.p_holm for variant in analysis.variants for task in variant.tasks] == holm(raw)
    arrays = [
        (np.array(RIGHT, float), np.array(WORSE, float)),
        (np.array([0.5, 0.25]), np.array([0.5, 0.25])),
    ]
    assert w4.pooled == pooled(arrays)


def test_answers_are_compared_in_pairs() -> None:
    task = analyze(report([model("dense"), model("w4", WORSE)])).variants[0].tasks[0]
    assert task.output_tokens is not None
    assert task.terminated is not None
    assert (task.output_tokens.difference, task.output_tokens.lost, task.output_tokens.gained) == (
        -0.25,
        3,
        1,
    )
    assert (task.terminated.difference, task.terminated.p) == (0.0, 1.0)


def test_what_is_right_or_wrong_is_decided_once_per_task() -> None:
    def run(label: str, score: float, length: float) -> ModelRun:
        fields: dict[str, Any] = {
            "output_tokens": (0.0, length, 1.0, 1.0),
            "terminated": (1.0, 1.0, 0.0, 1.0),
        }
        return model_run(label, [task_run((0, score, 1, 1), "a", **fields)])

    analysis = analyze(report([run("dense", 1, 0), run("w4", 0, 1), run("w8", 1, 1)]))
    for variant in analysis.variants:
        (task,) = variant.tasks
        assert task.output_tokens is not None
        assert task.terminated is not None
        assert (task.score.binary, task.terminated.binary, task.output_tokens.binary) == (
            True,
            True,
            False,
        )
        assert task.score.reference == analysis.estimates["dense"]["a"].score
        assert task.output_tokens.variant == analysis.estimates[variant.label]["a"].output_tokens
    # Half a point for one item of one model: the metric is not right or wrong, for no model.
    half = analyze(report([run("dense", 1, 0), run("w4", 0.5, 1), run("w8", 1, 1)]))
    for variant in half.variants:
        assert not variant.tasks[0].score.binary
        assert variant.tasks[0].score.reference == half.estimates["dense"]["a"].score
        assert (
            half.estimates["dense"]["a"].score.interval
            != analysis.estimates["dense"]["a"].score.interval
        )


def test_a_task_that_only_one_model_generates_for() -> None:
    other = model_run("w4", [task_run(RIGHT, "a"), task_run((0.5, 0.25), "b")])
    analysis = analyze(report([model("dense"), other]))
    assert analysis.variants[0].tasks[0].output_tokens is None
    assert analysis.estimates["w4"]["a"].output_tokens is None
    assert analysis.estimates["dense"]["a"].output_tokens is not None


def test_the_reference_alone() -> None:
    analysis = analyze(report([model("dense")]))
    assert analysis.variants == ()
    assert analysis.estimates["dense"]["a"].score.value == 0.75


def test_items_pair_whatever_their_order() -> None:
    scores = (0, 0, 1, 1, 0, 0, 1, 1)
    straight = task_run(scores, "a")
    turned = task_run(
        scores[::-1], "a", doc_ids=straight.doc_ids[::-1], item_hashes=straight.item_hashes[::-1]
    )
    reference = model_run("dense", [task_run(RIGHT, "a")])
    scores = [
        analyze(report([reference, model_run("w4", [task])])).variants[0].tasks[0].score
        for task in (straight, turned)
    ]
    assert scores[0] == scores[1]
    assert (scores[1].lost, scores[1].gained) == (2, 0)


def test_other_items_are_refused() -> None:
    other = task_run(RIGHT, "a")
    hashes = list(other.item_hashes)
    hashes[2], hashes[5] = "e" * 64, "f" * 64
    changed = model_run("w4", [task_run(RIGHT, "a", item_hashes=tuple(hashes))])
    with pytest.raises(EvalError) as error:
        analyze(report([model_run("dense", [other]), changed]))
    message = str(error.value)
    assert message.startswith(
        "w4: task a: its items differ from those of dense (8 against 8, 2 of them different;"
        " item 2:"
    )
    assert (
        f"item 2: eeeeeeeeeeee instead of {other.item_hashes[2][:12]}; item 5: ffffffffffff"
        " instead of " in message
    )
    for cause in (
        "another chat template or tokenizer in one of the two folders",
        "other data",
        "another --seed",
    ):
        assert cause in message
    fewer = model_run("w4", [task_run(RIGHT[:-1], "a")])
    with pytest.raises(
        EvalError, match=r"7 against 8, 1 of them different; item 7: absent instead of "
    ):
        analyze(report([model_run("dense", [other]), fewer]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", "2.0"), ("num_fewshot", 5), ("output_type", "generate_until"), ("primary", "f1")],
)
def test_another_kind_of_task_is_refused(field: str, value: object) -> None:
    task = task_run(RIGHT, "a").model_copy(
        update={"scores": {"exact_match,none": RIGHT, "f1": RIGHT}, field: value}
    )
    other = model_run("w4", [task])
    with pytest.raises(
        EvalError, match=f"w4: task a has {field} {value!r}: expected .* as for dense. "
    ):
        analyze(report([model_run("dense", [task_run(RIGHT, "a")]), other]))


def test_other_tasks_are_refused() -> None:
    other = model_run("w4", [task_run(RIGHT, "a"), task_run(RIGHT, "c")])
    with pytest.raises(EvalError, match="w4 lacks b and also has c: expected the tasks of dense"):
        analyze(report([model("dense"), other]))
    with pytest.raises(EvalError, match="dense: has no tasks"):
        analyze(report([model_run("dense", [])]))


def test_models_of_several_files(tmp_path: Path, first: Path) -> None:
    second = save(
        tmp_path / "second.json",
        report([model("dense"), model("gptq", WORSE)], command="svsk bench again"),
    )
    merged, notes = merge_reports([first, second])
    assert [run.label for run in merged.models] == ["dense", "w4", "gptq"]
    assert merged.command == "svsk bench\nsvsk bench again"
    assert notes == []
    assert [variant.label for variant in compare_reports([first, second]).variants] == [
        "w4",
        "gptq",
    ]


def test_a_model_in_two_files_appears_once(tmp_path: Path, first: Path) -> None:
    again = save(
        tmp_path / "again.json", report([model("dense", second=(0.5, 0.5)), model("w4", WORSE)])
    )
    merged, notes = merge_reports([first, again])
    assert [run.label for run in merged.models] == ["dense", "w4"]
    assert notes == [
        f"{again}: dense scored differently there; the figures of the earlier file are shown."
    ]
    assert merged.models[0] == load_report(first).models[0]


def test_different_models_of_one_label(tmp_path: Path, first: Path) -> None:
    files = [first]
    for number in range(2):
        other = model("w4", WORSE, fingerprint=f"{number}")
        files.append(save(tmp_path / f"{number}.json", report([model("dense"), other])))
    assert [run.label for run in merge_reports(files)[0].models] == [
        "dense",
        "w4",
        "w4 (2)",
        "w4 (3)",
    ]


def test_figures_against_another_reference_are_left_out(tmp_path: Path) -> None:
    relative = text(delta_nll=0.1, kl_mean=0.05, kl_mean_se=0.01, top1=0.9)
    first = save(
        tmp_path / "a.json", report([model("dense", text=(text(),)), model("w4", text=(relative,))])
    )
    other = save(
        tmp_path / "b.json",
        report([model("other", text=(text(),)), model("gptq", text=(relative,))]),
    )
    merged, notes = merge_reports([first, other])
    texts = {run.label: run.text[0] for run in merged.models}
    assert texts["w4"] == relative
    assert texts["gptq"] == text()
    assert "against another reference" in notes[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", "hf"),
        ("data", "local"),
        ("limit", 8),
        ("seed", 1),
        ("gen_kwargs", {"temperature": 0.5}),
        ("apply_chat_template", False),
        ("fewshot_as_multiturn", False),
        ("system_instruction", "Be brief."),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, first: Path, field: str, value: object) -> None:
    other = save(
        tmp_path / "other.json", report([model("dense"), model("w4", WORSE)], **{field: value})
    )
    with pytest.raises(EvalError) as error:
        merge_reports([first, other])
    assert str(error.value).startswith(f"{other}: was run with {field} {value!r}: expected ")
    assert str(first) in str(error.value)


def test_other_items_in_another_file_are_refused(tmp_path: Path, first: Path) -> None:
    other = save(tmp_path / "other.json", report([model("dense", RIGHT[:4])]))
    with pytest.raises(
        EvalError, match=r"other.json: dense: task a: its items differ from those of dense"
    ):
        merge_reports([first, other])


def test_what_may_change_scores_is_noted(tmp_path: Path, first: Path) -> None:
    models = [model("dense"), model("gptq", WORSE)]
    versions = {"lm_eval": "0.4.10", "vllm": "0.32.1", "torch": "2.13"}
    changed = report(models, hardware="a GPU", versions=versions, model_args={"max_model_len": 64})
    other = save(tmp_path / "other.json", changed)
    analysis = compare_reports([first, other])
    text = "\n".join(analysis.notes)
    for words in (
        "max_model_len",
        "lm_eval 0.4.10 (0.4.9), torch 2.13 (absent).",
        "a GPU. Speeds cannot be compared",
    ):
        assert words in text
    assert analysis.report.hardware == "a processor; a GPU"
    assert set(analysis.notes) <= set(analysis.all_notes())


def test_which_files_are_of_svsk_bench(tmp_path: Path, first: Path) -> None:
    other, broken = tmp_path / "eval.json", tmp_path / "broken.json"
    other.write_text('{"nll": 2.5}')
    broken.write_text('{"kind": "svsk-bench"')
    listed = tmp_path / "list.json"
    listed.write_text("[]")
    answers = [
        is_bench_report(path)
        for path in (first, other, broken, listed, tmp_path / "absent.json", tmp_path)
    ]
    assert answers == [True, False, False, False, False, False]


def test_files_that_cannot_be_merged(tmp_path: Path, first: Path) -> None:
    other = tmp_path / "eval.json"
    other.write_text('{"nll": 2.5}')
    with pytest.raises(
        EvalError, match=r"eval.json: not a file of this version's `svsk bench --json`"
    ):
        merge_reports([first, other])
    with pytest.raises(EvalError, match="Got no file"):
        merge_reports([])


def test_the_command_shows_and_writes(tmp_path: Path, first: Path) -> None:
    second = save(tmp_path / "second.json", report([model("dense"), model("gptq", WORSE)]))
    json_file, markdown, html = (tmp_path / name for name in ("out.json", "out.md", "out.html"))
    stream = io.StringIO()
    compare_and_print(Console(file=stream), [first, second], json_file, markdown, html)
    stored = json.loads(json_file.read_text())
    assert (stored["kind"], stored["baseline"]) == ("svsk-bench-comparison", "dense")
    assert [found["label"] for found in stored["comparisons"]] == ["w4", "gptq"]
    score = stored["comparisons"][1]["tasks"][0]["score"]
    assert (score["lost"], score["gained"], score["recovery"]) == (3, 1, pytest.approx(4 / 6))
    for shown in (stream.getvalue(), markdown.read_text(), html.read_text()):
        assert all(label in shown for label in ("dense", "w4", "gptq"))
    assert not is_bench_report(json_file)


def test_only_a_page_needs_optional_packages(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = sys.modules['jinja2'] = None\n"
        "from pathlib import Path; from rich.console import Console\n"
        "from svsk_eval.report.merge import compare_and_print\n"
        "compare_and_print(Console(), sys.argv[1:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(first)], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert "w4" in process.stdout
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for module in ("html", "page"):
        monkeypatch.delitem(sys.modules, f"svsk_eval.report.{module}", raising=False)
    with pytest.raises(
        EvalError, match=r"needs the package jinja2, .* pip install 'svsk-vllm\[eval\]'"
    ):
        compare_and_print(Console(file=io.StringIO()), [first], html=tmp_path / "out.html")


def test_what_is_below_the_minimum() -> None:
    analysis = analyze(report([model("dense"), model("w4", WORSE), model("same")]))
    assert below_minimum(analysis, 0.9) == ["w4, a: recovery 0.6667 is below 0.9"]


def test_the_minimum_itself_is_enough() -> None:
    exact = report(
        [
            model_run("dense", [task_run([1.0, 0.1], "a")]),
            model_run("w4", [task_run([0.99, 0.099], "a")]),
        ]
    )
    assert below_minimum(analyze(exact), 0.99) == []
    assert len(below_minimum(analyze(exact), 0.991)) == 1


def test_a_reference_that_scores_zero_cannot_be_held_to_a_minimum() -> None:
    runs = [model_run(name, [task_run((0, 0, 0), "a")]) for name in ("dense", "w4")]
    (failure,) = below_minimum(analyze(report(runs)), 0.5)
    assert "w4, a: cannot be judged: the reference scores 0.0000" in failure
