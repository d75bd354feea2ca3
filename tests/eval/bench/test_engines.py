# SPDX-License-Identifier: Apache-2.0
"""lm-eval's hf model with a journal answers as lm-eval's own does, and asks nothing twice."""

import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import svsk_vllm.hf  # noqa: F401  # lm-eval's own class needs it
from svsk_eval.bench.engines import hf_model, vllm_model
from svsk_eval.bench.journal import Journal
from svsk_eval.bench.journaled_model import likelihood
from svsk_eval.errors import EvalError
from tests.support.tiny_models import EOS, write_dense, write_random_svsk

GREEDY = {"until": ["e", "\n"], "max_gen_toks": 16, "do_sample": False}
PROMPTS = ["The rate", "of stones", "in a tin", "The rate", "is here and", "not"]
ARGUMENTS = {"dtype": "float32", "batch_size": 2, "device": "cpu"}


def generations(settings: dict[str, Any] = GREEDY, prompts: list[str] = PROMPTS) -> list[Instance]:
    return [
        Instance("generate_until", {}, (prompt, settings), index)
        for index, prompt in enumerate(prompts)
    ]


def likelihoods() -> list[Instance]:
    pairs = [
        ("The rate", " of"),
        ("The rate", " in a tin"),
        ("of", " stones"),
        ("The rate", " of"),
        ("", "tin"),
    ]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_random_svsk(write_dense(folder / "dense"), folder / "svsk")


def model_of(folder: Path, journal: Path, counts: list[tuple[int, int]]) -> Any:
    return hf_model(
        {"pretrained": str(folder), **ARGUMENTS},
        Journal(journal),
        lambda count: counts.append((count.done, count.known)),
    )


def test_answers_are_lm_evals_own_and_are_not_asked_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = HFLM(pretrained=str(folder), **ARGUMENTS)
    texts, pairs = plain.generate_until(generations()), plain.loglikelihood(likelihoods())
    rolling = plain.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("The rate of stones",), 0)]
    )
    assert len(set(texts)) > 2

    counts: list[tuple[int, int]] = []
    model = model_of(folder, tmp_path / "j.jsonl", counts)
    assert model.generate_until(generations()[:3]) == texts[:3]
    assert model.generate_until(generations()) == texts
    assert counts[-1] == (9, 9)
    assert len(model.journal) == 5
    first_tokens = model.new_tokens
    assert first_tokens == sum(
        answer.tokens for answer in model.generated([r.args for r in generations()][:3])
    ) + sum(answer.tokens for answer in model.generated([r.args for r in generations()][4:]))
    answers = model.loglikelihood(likelihoods())
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in pairs]
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in pairs], abs=1e-5)
    assert model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("The rate of stones",), 0)]
    ) == (pytest.approx(rolling, abs=1e-5))
    assert counts[-1] == (15, 15)
    model.journal.close()

    again = model_of(folder, tmp_path / "j.jsonl", [])
    for name in ("_model_generate", "_model_call"):
        monkeypatch.setattr(again, name, lambda *_, **__: pytest.fail("the model was asked again"))
    assert again.generate_until(generations()) == texts
    assert again.loglikelihood(likelihoods()) == answers
    assert again.new_tokens == 0


def test_endings(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder, tmp_path / "j.jsonl", [])
    encode = model.tokenizer.encode

    def ending(text: str, *more: int, stop: tuple[str, ...] = ("ee", "")) -> tuple[int, bool]:
        return model._ending([*encode(text), *more], list(stop))

    assert ending("sand") == (len(encode("sand")), False)
    assert ending("sand", EOS, EOS) == (len(encode("sand")) + 1, True)
    # Two tokens make the stop string together; what comes after it does not count, an end of text
    # neither.
    split = [*encode("x e"), *encode("e"), *encode("more"), EOS]
    assert model._ending(split, ["ee"]) == (len(encode("x e")) + 1, True)
    # A stop string after the end of text is none.
    assert model._ending([*encode("x"), EOS, *encode("ee")], ["ee"]) == (len(encode("x")) + 1, True)


def test_endings_are_recorded(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder, tmp_path / "j.jsonl", [])
    settings = {**GREEDY, "max_gen_toks": 3, "until": []}
    texts = model.generate_until(generations(settings))
    for answer, text in zip(
        model.generated([r.args for r in generations(settings)]), texts, strict=True
    ):
        assert answer.text == text
        assert 1 <= answer.tokens <= 3
        assert answer.stopped or answer.tokens == 3
    with pytest.raises(KeyError):
        model.generated([("another prompt", settings)])


def test_sampled_repeats_are_answers_of_their_own(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder, tmp_path / "j.jsonl", [])
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = generations(settings, ["The rate"] * 4)
    texts = model.generate_until(requests)
    assert len(set(texts)) > 1
    assert len(model.journal) == 4
    assert model.generate_until(requests) == texts
    assert [
        answer.text for answer in model.generated([request.args for request in requests])
    ] == texts


def test_replicas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="data_parallel_size=2: answers are kept one by one only"):
        vllm_model({"data_parallel_size": 2}, Journal(tmp_path / "j.jsonl"), lambda count: None)


def test_without_vllm_the_other_engine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "svsk_eval.bench.vllm_engine", None)  # it imports vLLM
    with pytest.raises(
        EvalError,
        match=r"--engine vllm: vLLM is not installed \(.*\)\. Install it, or use --engine hf",
    ):
        vllm_model({}, Journal(tmp_path / "j.jsonl"), lambda count: None)


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf")])
def test_log_probabilities_that_are_none_are_refused(logprob: float) -> None:
    assert likelihood(-1.5, None).logprob == -1.5
    with pytest.raises(
        EvalError,
        match=rf"The model gives a text the log-probability {logprob}\. Try another --dtype",
    ):
        likelihood(logprob, None)
