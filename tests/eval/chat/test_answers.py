# SPDX-License-Identifier: Apache-2.0
"""Answers are those of a plain loop, and are kept for whoever asks the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from svsk_eval.chat import scoring
from svsk_eval.chat.answers import end_tokens, greedy_answers
from svsk_eval.chat.scoring import evaluate_chat, prepare_chat
from svsk_eval.errors import EvalError
from svsk_eval.text.models import load_model, load_tokenizer
from tests.eval.chat.support import LIMIT, QUESTIONS, naive_answer, prompt_ids, request
from tests.support.format_builders import edit_json
from tests.support.tiny_models import EOS


def test_answers_are_those_of_a_plain_loop(models: Path) -> None:
    model, tokenizer = load_model(models / "dense"), load_tokenizer(models / "dense")
    ends = end_tokens(model, tokenizer, "dense")
    assert len(ends) == 2
    assert EOS in ends
    asked = {question: prompt_ids(models / "dense", question) for question in QUESTIONS}
    expected = {name: naive_answer(model, ids, ends, LIMIT) for name, ids in asked.items()}
    assert {end is None for _, end in expected.values()} == {True, False}, "a case of either kind"
    batches: list[dict[str, Any]] = []
    greedy_answers(model, tokenizer, asked, ends, LIMIT, batches.append)
    assert [len(batch) for batch in batches] == [8, 2]
    found = {name: answer for batch in batches for name, answer in batch.items()}
    assert {name: (list(answer.answer), answer.end) for name, answer in found.items()} == expected
    for name, answer in found.items():
        assert list(answer.prompt) == asked[name]
        assert answer.text == tokenizer.decode(list(answer.answer))
        assert answer.tokens == (
            *answer.prompt,
            *answer.answer,
            *([] if answer.end is None else [answer.end]),
        )


def test_a_model_without_an_end_is_refused(models: Path) -> None:
    model, tokenizer = load_model(models / "dense"), load_tokenizer(models / "dense")
    tokenizer.eos_token = None
    assert len(end_tokens(model, tokenizer, "m")) == 2
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, tokenizer, "m") == [7]
    model.generation_config.eos_token_id = None
    with pytest.raises(
        EvalError, match=r"m: neither generation_config\.json nor the tokenizer names"
    ):
        end_tokens(model, tokenizer, "m")


def test_answers_are_kept_and_asked_for_once(
    models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "answers.json"
    asked: list[int] = []
    original = scoring.greedy_answers

    def counted(model: Any, tokenizer: Any, missing: Any, *rest: Any) -> None:
        asked.append(len(missing))
        original(model, tokenizer, missing, *rest)

    monkeypatch.setattr(scoring, "greedy_answers", counted)
    scores = [
        evaluate_chat(prepare_chat(request(models, prompts, model, prompts=count, answers=kept)))
        for model, count in (("svsk", 4), ("svsk", 10), ("other", 10), ("svsk", 4))
    ]
    assert asked == [4, 6]
    assert scores[0] == scores[3]
    assert scores[1].answers_fingerprint == scores[2].answers_fingerprint
    assert scores[0].answers_fingerprint != scores[1].answers_fingerprint
    stored = json.loads(kept.read_text())
    assert len(stored["answers"]) == len(QUESTIONS)
    assert (stored["dtype"], stored["answer_tokens"]) == ("float32", LIMIT)


@pytest.mark.parametrize(
    ("dtype", "multiplies", "answered", "scored"),
    [
        ("auto", True, "bfloat16", "float32"),
        ("auto", False, "float32", "float32"),
        ("float32", True, "float32", "float32"),
        ("bfloat16", False, "bfloat16", "bfloat16"),
    ],
)
def test_answers_are_made_in_the_faster_dtype_unless_one_is_named(
    models: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    multiplies: bool,
    answered: str,
    scored: str,
) -> None:
    monkeypatch.setattr(scoring, "has_bf16_products", lambda: multiplies)
    kept, used = tmp_path / "answers.json", []
    original = scoring.greedy_answers

    def noted(model: Any, *rest: Any) -> None:
        used.append(str(model.dtype))
        original(model, *rest)

    monkeypatch.setattr(scoring, "greedy_answers", noted)
    changes = {"prompts": 1, "answers": kept, "dtype": dtype, "device": "cpu"}
    prepared = prepare_chat(request(models, prompts, "dense", **changes))
    scores = evaluate_chat(prepared)
    assert used == [f"torch.{answered}"]
    assert (prepared.dtype, json.loads(kept.read_text())["dtype"]) == (scored, answered)
    assert scores.figures()["kl"].mean == 0.0


def test_answers_that_were_finished_before_an_interruption_are_kept(
    models: Path, prompts: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "answers.json"

    def stop(what: str, done: int, total: int) -> None:
        if (what, done, total) == ("answers", 8, 10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_chat(prepare_chat(request(models, prompts, answers=kept)), stop)
    assert len(json.loads(kept.read_text())["answers"]) == 8


def test_answers_of_others_are_refused(models: Path, prompts: Path, tmp_path: Path) -> None:
    kept = tmp_path / "answers.json"
    evaluate_chat(prepare_chat(request(models, prompts, prompts=1, answers=kept)))
    others = {"reference": str(models / "other"), "model": str(models / "other")}
    with pytest.raises(EvalError, match=r"answers\.json: holds answers of another reference"):
        prepare_chat(request(models, prompts, prompts=1, answers=kept, **others))
    with pytest.raises(EvalError, match=r"answers of up to 12 tokens, --answer-tokens is 5"):
        prepare_chat(request(models, prompts, prompts=1, answers=kept, answer_tokens=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("answers"), "answers: is missing"),
        (lambda file: file["answers"].update(x={"prompt": [1], "answer": []}), "end: is missing"),
        (
            lambda file: file["answers"].update(x={"prompt": [1], "answer": [], "end": None}),
            "expected a prompt, and an answer or its end",
        ),
        (
            lambda file: file["answers"].update(x={"prompt": [1], "answer": [-1], "end": 2}),
            "expected at least 0, got -1",
        ),
    ],
)
def test_damaged_answers_are_refused(
    models: Path, prompts: Path, tmp_path: Path, change: Any, message: str
) -> None:
    kept = tmp_path / "answers.json"
    evaluate_chat(prepare_chat(request(models, prompts, prompts=1, answers=kept)))
    edit_json(kept, change)
    with pytest.raises(EvalError, match=rf"--answers .*not a file of answers .*{message}"):
        prepare_chat(request(models, prompts, prompts=1, answers=kept))
    kept.write_text("not json")
    with pytest.raises(EvalError, match=r"--answers .*not a file of answers .*not valid JSON"):
        prepare_chat(request(models, prompts, prompts=1, answers=kept))
    with pytest.raises(
        EvalError,
        match=r"--answers .*: cannot be read \(Is a directory\)\. Name a file that `svsk eval",
    ):
        prepare_chat(request(models, prompts, prompts=1, answers=tmp_path))
