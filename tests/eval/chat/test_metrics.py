# SPDX-License-Identifier: Apache-2.0
"""Figures of an answer against scipy, and means over prompts by hand."""

import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from svsk_eval.chat.answers import Answer
from svsk_eval.chat.metrics import ChatScores, first_flip, score_answer, summarize_chat
from svsk_eval.errors import EvalError

VOCABULARY = 11
ENDS = (2, 9)
SERIES = {
    "nll", "ref_nll", "kl", "top1", "early_end", "ref_early_end",
    "end_kl", "end_probability", "ref_end_probability",
}  # fmt: skip


def logits(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def test_figures_of_an_answer() -> None:
    answer = Answer(prompt=(1, 4), answer=(5, 0, 7), end=9)
    model, reference = logits(4, 0), logits(4, 1)
    reference[1] = model[1]
    figures = score_answer(model, reference, answer, ENDS)
    assert set(figures) == SERIES
    ours, theirs = (log_softmax(values.double().numpy(), axis=-1) for values in (model, reference))
    kl = rel_entr(np.exp(theirs), np.exp(ours)).sum(-1)
    places = [0, 1, 2], [5, 0, 7]
    q, p = (np.exp(values[:, list(ENDS)]).sum(-1) for values in (ours, theirs))
    same = ours.argmax(-1) == theirs.argmax(-1)
    expected = {
        "nll": -ours[places].mean(),
        "ref_nll": -theirs[places].mean(),
        "kl": kl[:3].mean(),
        "top1": same[:3].mean(),
        "early_end": 1 - (1 - q[0]) * (1 - q[1]) * (1 - q[2]),
        "ref_early_end": 1 - (1 - p[0]) * (1 - p[1]) * (1 - p[2]),
        "end_kl": kl[3],
        "end_probability": q[3],
        "ref_end_probability": p[3],
    }
    assert figures == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["top1"] < 1, "a case that shows nothing"


def test_the_first_flip() -> None:
    model, reference = logits(6, 0), logits(6, 1)
    same = (model.argmax(-1) == reference.argmax(-1)).tolist()
    assert first_flip(model, reference) == same.index(False)
    later = reference.clone()
    later[:4] = model[:4] * 3  # the same order of tokens
    assert first_flip(model, later) == 4 + same[4:].index(False)
    assert first_flip(model, model * 2) is None
    assert first_flip(model[:0], reference[:0]) is None


def test_an_answer_at_the_limit_has_no_end_and_an_empty_one_no_tokens() -> None:
    model, reference = logits(4, 0), logits(4, 1)
    whole = score_answer(model, reference, Answer(prompt=(1,), answer=(5, 0, 7), end=9), ENDS)
    limit = score_answer(
        model[:3], reference[:3], Answer(prompt=(1,), answer=(5, 0, 7), end=None), ENDS
    )
    empty = score_answer(model[3:], reference[3:], Answer(prompt=(1,), answer=(), end=9), ENDS)
    at_the_end = {"end_kl", "end_probability", "ref_end_probability"}
    assert {name for name, value in limit.items() if value is None} == at_the_end
    assert {name for name, value in empty.items() if value is None} == SERIES - at_the_end
    for name, value in whole.items():
        assert (empty if name in at_the_end else limit)[name] == pytest.approx(value, abs=1e-9)


def test_a_model_that_surely_ends_sooner() -> None:
    model = torch.zeros(2, VOCABULARY)
    model[0, 2] = 200.0
    answer = Answer(prompt=(1,), answer=(5,), end=2)
    figures = score_answer(model, torch.zeros(2, VOCABULARY), answer, ENDS)
    assert figures["early_end"] == 1.0
    assert figures["ref_early_end"] == pytest.approx(2 / VOCABULARY)
    assert figures["end_probability"] == pytest.approx(2 / VOCABULARY)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = logits(2, 0)
    model[1, 3] = math.nan
    with pytest.raises(EvalError, match="not finite"):
        score_answer(model, logits(2, 1), Answer(prompt=(1,), answer=(5,), end=2), ENDS)


def summary(**series: tuple[float | None, ...]) -> ChatScores:
    answers = [
        Answer(prompt=(1,), answer=(5, 6), end=2),
        Answer(prompt=(1, 3), answer=(), end=2),
        Answer(prompt=(1,), answer=(7,), end=None),
        Answer(prompt=(4,), answer=(7, 8, 3), end=9),
    ]
    at_the_end = ("end_kl", "end_probability", "ref_end_probability")
    plain: dict[str, tuple[float | None, ...]] = dict.fromkeys(SERIES, (0.5, None, 0.5, 0.5))
    plain |= dict.fromkeys(at_the_end, (0.5, 0.5, None, 0.5))
    every = plain | series
    scores: list[Mapping[str, float | None]] = [
        {name: values[row] for name, values in every.items()} for row in range(4)
    ]
    return summarize_chat(answers, scores, 16)


def test_means_over_the_prompts_that_have_a_figure() -> None:
    scores = summary(
        kl=(1.0, None, 2.0, 6.0),
        nll=(1.0, None, 1.0, 2.0),
        ref_nll=(0.5, None, 1.0, 1.0),
        end_kl=(0.0, 1.0, None, 2.0),
    )
    assert (scores.prompts, scores.finished, scores.tokens, scores.answer_tokens) == (4, 3, 6, 16)
    figures = scores.figures()
    # 1, 2, 6 around 3: deviation sqrt(7)
    assert (figures["kl"].mean, figures["kl"].se) == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert figures["delta_nll"].mean == pytest.approx(0.5)
    assert (figures["end_kl"].mean, figures["end_kl"].se) == pytest.approx((1.0, 1 / math.sqrt(3)))
    written = json.loads(json.dumps(scores.to_json()))
    assert (written["kl"], written["kl_se"]) == (figures["kl"].mean, figures["kl"].se)
    assert ChatScores.model_validate(written) == scores


def test_answers_are_told_apart_by_their_tokens_and_where_they_begin() -> None:
    def fingerprint(*answers: Answer) -> str:
        score = dict.fromkeys(SERIES, 0.5)
        return summarize_chat(answers, [score] * len(answers), 16).answers_fingerprint

    different = {
        fingerprint(Answer(prompt=(1, 3), answer=(4,), end=2)),
        fingerprint(Answer(prompt=(1,), answer=(3, 4), end=2)),
        fingerprint(Answer(prompt=(1,), answer=(3, 4, 2), end=None)),
        fingerprint(Answer(prompt=(1, 3), answer=(4,), end=9)),
        fingerprint(*[Answer(prompt=(1, 3), answer=(4,), end=2)] * 2),
    }
    assert len(different) == 5


def test_one_prompt_has_no_standard_error_and_no_finished_answer_no_end() -> None:
    answer = Answer(prompt=(1,), answer=(7,), end=None)
    score = score_answer(logits(1, 0), logits(1, 1), answer, ENDS)
    scores = summarize_chat([answer], [score], 1)
    figures = scores.figures()
    assert figures["kl"].se is None
    assert "end_kl" not in figures
    assert "end_kl" not in scores.to_json()
