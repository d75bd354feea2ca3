# SPDX-License-Identifier: Apache-2.0
"""The code tasks: from answers to programs, their score, and consent."""

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evaluate
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks._yaml_loader import load_yaml

from svsk_eval.errors import EvalError
from svsk_eval.task_data import DATA_VARIABLE
from svsk_eval.task_data.code_tasks import estimate_pass_at_k, first_code_block, pass_at_k
from tests.eval.support import EVAL, load_task, published_file
from tests.eval.task_data.benchmark_files import HUMANEVAL, MBPP, write_files
from tests.eval.task_data.stand_in import CONSENT, install_stand_in


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Local files of our own, consent, and the stand-in for the sandbox."""
    monkeypatch.setenv(DATA_VARIABLE, str(write_files(tmp_path / "data")))
    return install_stand_in(monkeypatch)


def score(task: Any, doc: Mapping[str, Any], *answers: str) -> dict[str, float]:
    """The task's own filters and metrics on the answers of one document."""
    instance = Instance(
        "generate_until", doc=dict(doc), arguments=("", {}), idx=0, metadata=("task", 0, 1)
    )
    instance.resps = list(answers)
    (ensemble,) = task._filters
    ensemble.apply([instance])
    assert task.config.metadata["primary"] == f"pass@1,{ensemble.name}"
    scores: dict[str, float] = task.process_results(
        instance.doc, [instance.filtered_resps[ensemble.name]]
    )
    return scores


def lm_eval_utils(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions of lm-eval's own task, whose import fetches a metric."""

    class NoMetric:
        def compute(self, **_: object) -> tuple[dict[str, float], None]:
            return {"pass@1": 0.0}, None

    import importlib

    monkeypatch.setattr(evaluate, "load", lambda name: NoMetric())
    monkeypatch.delitem(sys.modules, f"lm_eval.tasks.{name}.utils", raising=False)
    module = importlib.import_module(f"lm_eval.tasks.{name}.utils")
    monkeypatch.delitem(sys.modules, f"lm_eval.tasks.{name}.utils")
    return module


class TestHumanEval:
    def test_solutions_pass_and_empty_answers_do_not(self, ran: list[str]) -> None:
        task = load_task("svsk_humaneval")
        for doc in task.eval_docs:
            assert score(task, doc, doc["canonical_solution"]) == {"pass@1": 1.0}
            assert score(task, doc, "") == {"pass@1": 0.0}
            assert score(task, doc, "    return None\n") == {"pass@1": 0.0}

    def test_program_is_prompt_answer_tests_and_call(self, ran: list[str]) -> None:
        task = load_task("svsk_humaneval")
        score(task, task.eval_docs[1], "    return x + 3\n")
        row = HUMANEVAL[1]
        assert ran[-1] == f"{row['prompt']}    return x + 3\n\n{row['test']}\ncheck(plus_three)"

    def test_instruct_answer_ends_with_its_code_block(self, ran: list[str]) -> None:
        task = load_task("svsk_humaneval_instruct")
        doc = task.eval_docs[0]
        assert score(task, doc, doc["canonical_solution"] + "```\nThis doubles x.") == {
            "pass@1": 1.0
        }
        assert score(task, doc, doc["canonical_solution"]) == {"pass@1": 1.0}
        assert score(task, doc, "```python\n" + doc["canonical_solution"]) == {"pass@1": 0.0}

    def test_all_published_solutions_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_stand_in(monkeypatch)
        monkeypatch.setenv(DATA_VARIABLE, str(published_file("HumanEval.jsonl.gz").parent))
        task = load_task("svsk_humaneval")
        assert len(task.eval_docs) == 164
        for doc in task.eval_docs:
            assert score(task, doc, doc["canonical_solution"]) == {"pass@1": 1.0}, doc["task_id"]
            assert score(task, doc, "") == {"pass@1": 0.0}, doc["task_id"]

    def test_in_the_real_sandbox(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("svsk_eval.sandbox")
        monkeypatch.setenv(CONSENT, "1")
        monkeypatch.setenv(DATA_VARIABLE, str(write_files(tmp_path / "data")))
        task = load_task("svsk_humaneval")
        doc = task.eval_docs[0]
        assert score(task, doc, doc["canonical_solution"]) == {"pass@1": 1.0}
        assert score(task, doc, "") == {"pass@1": 0.0}


class TestMbpp:
    def test_solutions_pass_and_empty_answers_do_not(self, ran: list[str]) -> None:
        task = load_task("svsk_mbpp")
        assert [doc["task_id"] for doc in task.eval_docs] == [11, 12, 510]
        for doc in task.eval_docs:
            assert score(task, doc, doc["code"]) == {"pass@1": 1.0}
            assert score(task, doc, "") == {"pass@1": 0.0}

    def test_setup_runs_between_the_answer_and_the_tests(self, ran: list[str]) -> None:
        task = load_task("svsk_mbpp")
        score(task, task.eval_docs[1], "code")
        row = next(row for row in MBPP if row["task_id"] == 12)
        assert ran[-1] == "\n".join(["code", "start = 1", *row["test_list"]])
        score(task, task.eval_docs[0], "code")
        assert ran[-1].splitlines()[:2] == ["code", MBPP[5]["test_list"][0]]

    def test_instruct_answer_is_its_first_code_block(self, ran: list[str]) -> None:
        task = load_task("svsk_mbpp_instruct")
        doc = task.eval_docs[0]
        assert score(task, doc, doc["code"] + "\n```\nand ```python\nexit()\n```") == {
            "pass@1": 1.0
        }
        assert score(task, doc, doc["code"]) == {"pass@1": 0.0}, (
            "a block that does not end has no code"
        )

    @pytest.mark.parametrize(
        ("answer", "code"),
        [
            ("\na = 1\n```", "a = 1"),
            ("\na = 1\n```\nThen:\n```python\nb = 2\n```", "a = 1"),
            ("\na = 1\n\n```", "a = 1\n"),
            ("python\na = 1\n```", "a = 1"),
            ("a = 1", ""),
            ("", ""),
            ("```", ""),
            ("\ndef f():\n    return 1\n```", "def f():\n    return 1"),
        ],
    )
    def test_extraction_is_that_of_lm_eval(
        self, answer: str, code: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert first_code_block(answer) == code
        assert lm_eval_utils("mbpp", monkeypatch).extract_code_blocks(answer) == code

    def test_extraction_keeps_the_first_word_where_lm_eval_drops_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = "def f():\n    return 1\n```"
        assert first_code_block(answer) == "def f():\n    return 1"
        assert (
            lm_eval_utils("mbpp", monkeypatch).extract_code_blocks(answer) == " f():\n    return 1"
        )


@pytest.mark.parametrize("answer", ["    return 2 * x\n", "    return x```\nok```", "", "```"])
def test_humaneval_programs_are_those_of_lm_eval(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = lm_eval_utils("humaneval", monkeypatch)
    for name, theirs in (
        ("", utils.build_predictions),
        ("_instruct", utils.build_predictions_instruct),
    ):
        ours = load_yaml(EVAL / "tasks" / f"svsk_humaneval{name}.yaml")["filter_list"][0]["filter"][
            0
        ]["filter_fn"]
        assert ours([[answer, "x"]], HUMANEVAL[:1]) == theirs([[answer, "x"]], HUMANEVAL[:1])


class TestPassAtK:
    @pytest.mark.parametrize(
        ("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 4), (6, 1, 6), (4, 3, 2)]
    )
    def test_is_the_share_of_samples_of_k_answers_with_a_correct_one(
        self, n: int, c: int, k: int
    ) -> None:
        samples = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert estimate_pass_at_k(n, c, k) == pytest.approx(sum(map(any, samples)) / len(samples))

    @pytest.mark.parametrize("k", [0, 3])
    def test_wants_as_many_answers_as_k(self, k: int) -> None:
        with pytest.raises(EvalError, match=rf"pass@{k}: got 2 answer.*Raise `repeats`"):
            estimate_pass_at_k(2, 1, k)

    def test_of_several_problems_and_repeats(self, ran: list[str]) -> None:
        estimates = pass_at_k(
            ["assert x == 1", "assert x == 2"], [["x = 1", "x = 2"], ["x = 1", "x = 3"]], k=[1, 2]
        )
        assert estimates == {"pass@1": 0.25, "pass@2": 0.5}
        assert ran == [
            "x = 1\nassert x == 1",
            "x = 2\nassert x == 1",
            "x = 1\nassert x == 2",
            "x = 3\nassert x == 2",
        ]
        assert pass_at_k(["assert x == 1"], ["x = 1"]) == {"pass@1": 1.0}

    def test_repeats_of_a_task_count_together(self, ran: list[str]) -> None:
        task = load_task("svsk_humaneval")
        doc = task.eval_docs[0]
        assert score(task, doc, doc["canonical_solution"], "    return 0\n", "", "    oops") == {
            "pass@1": 0.25
        }


class TestConsent:
    @pytest.mark.parametrize(
        "name", ["svsk_humaneval", "svsk_humaneval_instruct", "svsk_mbpp", "svsk_mbpp_instruct"]
    )
    def test_is_asked_for_before_the_model_writes(
        self, name: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load_task(name)
        monkeypatch.setenv(CONSENT, "0")
        with pytest.raises(
            EvalError, match=r"runs programs that the model writes.* set HF_ALLOW_CODE_EVAL=1"
        ):
            load_task(name)

    def test_is_asked_for_when_programs_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = install_stand_in(monkeypatch, consent=False)
        with pytest.raises(EvalError, match="no consent"):
            pass_at_k(["assert True"], ["x = 1"])
        assert ran == []

    def test_sandbox_is_tried_before_the_model_writes(
        self, ran: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install_stand_in(monkeypatch, works=False)
        with pytest.raises(
            EvalError, match=r"mbpp runs programs in a sandbox.*sandbox \(seccomp\)"
        ):
            load_task("svsk_mbpp")
