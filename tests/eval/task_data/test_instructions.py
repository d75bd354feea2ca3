# SPDX-License-Identifier: Apache-2.0
"""IFEval: lm-eval's verdicts, without a network, the same each time."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate

from svsk_eval.errors import EvalError
from svsk_eval.task_data import benchmark_documents, task_manager
from svsk_eval.task_data.documents import DATA_VARIABLE
from svsk_eval.task_data.instructions import check_instructions, share_followed
from tests.eval.support import published_file
from tests.eval.task_data.benchmark_files import write_files

ABBREVIATIONS = "Mr. Smith of the U.S. army met Dr. Jones. He left at once."


def document(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    names, arguments = zip(*instructions, strict=True)
    return {
        "key": 1,
        "prompt": "A prompt.",
        "instruction_id_list": list(names),
        "kwargs": list(arguments),
    }


@pytest.mark.parametrize(
    ("instruction", "arguments", "followed", "broken"),
    [
        (
            "length_constraints:number_sentences",
            {"relation": "less than", "num_sentences": 3},
            ABBREVIATIONS,
            "One. Two. Three.",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_relation": "at least", "capital_frequency": 2},
            "It was VERY HOT. It was.",
            "It was VERY hot.",
        ),
        (
            "language:response_language",
            {"language": "de"},
            "Das ist ein kurzer Satz auf Deutsch und nichts weiter.",
            "This is a short sentence in English and nothing else.",
        ),
        ("punctuation:no_comma", {}, "No pause here", "A pause, here"),
        ("startend:quotation", {}, '"All" of "it"', "None of it"),
    ],
)
def test_verdicts(instruction: str, arguments: dict[str, Any], followed: str, broken: str) -> None:
    both = document((instruction, arguments), ("detectable_format:json_format", {}))
    verdict = check_instructions(both, [followed])
    assert verdict["inst_level_strict_acc"] == [True, False]
    assert verdict["prompt_level_strict_acc"] is False
    alone = document((instruction, arguments))
    assert check_instructions(alone, [followed])["prompt_level_strict_acc"] is True
    for answer in (broken, "", "  \n"):
        assert check_instructions(alone, [answer])["prompt_level_loose_acc"] is False


def test_arguments_that_the_hub_fills_up_do_not_matter() -> None:
    instruction = "length_constraints:number_words"
    arguments = {"relation": "less than", "num_words": 3}
    full = arguments | {"num_sentences": None, "language": None}
    for answer in ("two words", "these are four words"):
        assert check_instructions(document((instruction, arguments)), [answer]) == (
            check_instructions(document((instruction, full)), [answer])
        )


def test_loose_verdicts_forgive_a_first_line() -> None:
    verdict = check_instructions(document(("startend:quotation", {})), ['Sure:\n"All of it"'])
    assert verdict["prompt_level_strict_acc"] is False
    assert verdict["prompt_level_loose_acc"] is True


def test_languages_are_guessed_the_same_each_time() -> None:
    # Without a seed half of the guesses are Catalan.
    either = document(("language:response_language", {"language": "de"}))
    verdicts = {
        check_instructions(either, ["a der in"])["prompt_level_strict_acc"] for _ in range(40)
    }
    assert len(verdicts) == 1


def test_nothing_is_downloaded() -> None:
    script = (
        "import nltk\n"
        "def refuse(*_, **__): raise AssertionError('download')\n"
        "nltk.download = refuse\n"
        "from tests.eval.task_data.test_instructions import *\n"
        "test_verdicts('length_constraints:number_sentences',"
        " {'relation': 'less than', 'num_sentences': 3}, ABBREVIATIONS, 'One. Two. Three.')\n"
        "print(nltk.data.path[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert folder.name.startswith("svsk-nltk-")
    assert not folder.exists()


def test_a_missing_package_is_told_before_a_model_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(write_files(tmp_path / "data")))
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(
        EvalError, match=r"ifeval checks answers with packages of which langdetect is missing \("
    ):
        benchmark_documents("ifeval")


def test_share_of_instructions() -> None:
    assert share_followed([[True, False], [True], [True]]) == 0.75


def test_lm_eval_runs_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(write_files(tmp_path / "data")))
    results = simple_evaluate(
        model="dummy",
        tasks=["svsk_ifeval"],
        task_manager=task_manager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    # "lol": three words, one sentence, no comma
    assert results["results"]["svsk_ifeval"]["prompt_level_strict_acc,none"] == 0.5
    assert results["results"]["svsk_ifeval"]["inst_level_strict_acc,none"] == pytest.approx(2 / 3)


def test_the_real_files_instructions_are_all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(published_file("ifeval.jsonl").parent))
    documents = benchmark_documents("ifeval")["test"]
    kinds = {name for document in documents for name in document["instruction_id_list"]}
    assert len(kinds) == 25
    answer = f"{ABBREVIATIONS}\n\n* a point\n\nP.S. bye"
    verdicts = [check_instructions(document, [answer]) for document in documents]
    followed = share_followed([verdict["inst_level_strict_acc"] for verdict in verdicts])
    assert 0.1 < followed < 0.5
