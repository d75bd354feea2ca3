# SPDX-License-Identifier: Apache-2.0
"""The data of the smoke tasks: what is generated is what is shipped, and the answers are right."""

import ast
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from svsk_eval.errors import EvalError
from svsk_eval.task_data import documents, tasks_folder
from tests.eval.support import EVAL, load_task

DATA = EVAL / "tasks" / "data"
SIZES = {"facts": 120, "python": 100, "arithmetic": 100, "copy": 100}


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_smoke_data", DATA / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (DATA / f"{name}.jsonl").read_text(encoding="ascii").splitlines()
    ]


def test_generated_files_are_those_that_are_shipped(make: ModuleType) -> None:
    made = make.generated()
    assert set(made) == {"python.jsonl", "arithmetic.jsonl", "copy.jsonl"}
    for name, text in made.items():
        assert (DATA / name).read_bytes() == text.encode("ascii"), (
            f"{name}: run eval/tasks/data/make.py"
        )


@pytest.mark.parametrize("name", SIZES)
def test_items_are_many_different_and_all_loaded(name: str) -> None:
    items = rows(name)
    assert len(items) == len({row["question"] for row in items}) == SIZES[name]
    assert list(load_task(f"svsk_smoke_{name}").eval_docs) == items
    assert (DATA / f"{name}.jsonl").stat().st_size < 50_000


@pytest.mark.parametrize("name", ["facts", "python"])
def test_right_choices_are_at_every_position_equally_often(name: str) -> None:
    items = rows(name)
    assert Counter(row["answer"] for row in items) == dict.fromkeys(range(4), SIZES[name] // 4)
    positions = [row["answer"] for row in items]
    assert len({tuple(positions[start : start + 8]) for start in range(0, len(items), 8)}) > 10, (
        "no pattern"
    )


@pytest.mark.parametrize("name", ["facts", "python"])
def test_choices_differ_and_the_right_one_has_no_length_of_its_own(name: str) -> None:
    ranks: Counter[str] = Counter()
    for row in rows(name):
        assert len(set(row["choices"])) == 4, row
        lengths = [len(choice) for choice in row["choices"]]
        right = lengths.pop(row["answer"])
        assert max(*lengths, right) - min(*lengths, right) <= 13, row
        ranks["longest"] += right > max(lengths)
        ranks["shortest"] += right < min(lengths)
    assert ranks["longest"] < 0.4 * SIZES[name]
    assert ranks["shortest"] < 0.4 * SIZES[name]


def test_right_values_of_python_expressions_are_right_and_the_others_wrong() -> None:
    checked = 0
    for row in rows("python"):
        if not row["question"].startswith("assert "):
            continue
        expression = row["question"].removeprefix("assert ").removesuffix(" ==")
        value = eval(expression)
        assert [ast.literal_eval(choice) == value for choice in row["choices"]].index(True) == row[
            "answer"
        ], row
        assert sum(ast.literal_eval(choice) == value for choice in row["choices"]) == 1, row
        checked += 1
    assert checked == 60


def test_sums_are_right() -> None:
    for row in rows("arithmetic"):
        assert re.fullmatch(r"\d+ [-+*] \d+", row["question"])
        assert str(eval(row["question"])) == row["answer"]


def test_examples_of_arithmetic_are_right_and_not_asked() -> None:
    task = load_task("svsk_smoke_arithmetic")
    samples = task.config.fewshot_config.samples
    assert len(samples) == task.config.num_fewshot
    assert all(str(eval(sample["question"])) == sample["answer"] for sample in samples)
    assert not {sample["question"] for sample in samples} & {
        row["question"] for row in rows("arithmetic")
    }
    prompt = task.fewshot_context(task.eval_docs[0], task.config.num_fewshot)
    assert prompt.splitlines()[0] == "12 + 7 = 19"
    assert prompt.splitlines()[-1] == f"{rows('arithmetic')[0]['question']} ="


def test_answers_of_copying_follow_from_the_prompt() -> None:
    kinds = Counter()
    for row in rows("copy"):
        question, answer = row["question"], row["answer"]
        *before, last = [line for line in question.split("\n") if line]
        if last.endswith("->"):
            kinds["exchange"] += 1
            for line in before:
                left, right = line.split(" -> ")
                assert right == " ".join(reversed(left.split()))
            assert answer == " ".join(reversed(last.removesuffix(" ->").split()))
        elif last.endswith(" has the"):
            kinds["sentence"] += 1
            assert before[0].count(f"{last} {answer}") == before[0].count(last) == 1
        elif last.endswith(","):
            kinds["list"] += 1
            assert before == [f"{last} {answer}"]
        else:
            kinds["table"] += 1
            assert [line for line in before if line.startswith(last)] == [f"{last} {answer}"]
    assert kinds == dict.fromkeys(("exchange", "sentence", "list", "table"), 25)


def test_damaged_data_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "facts.jsonl").write_text('{"question": \n', encoding="utf-8")
    monkeypatch.setattr(documents, "tasks_folder", lambda: tmp_path)
    with pytest.raises(EvalError, match=r"facts\.jsonl: cannot read rows of JSON"):
        documents.shipped_documents("facts.jsonl")


def test_needs_neither_the_hub_nor_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setenv("SVSK_DATA", "/nowhere")
    for name in SIZES:
        task = load_task(f"svsk_smoke_{name}")
        assert task.config.dataset_path is None
        assert task.config.unsafe_code is False
    assert (tasks_folder() / "data").is_dir()
