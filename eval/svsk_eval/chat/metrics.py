# SPDX-License-Identifier: Apache-2.0
"""How far a model is from a reference on the reference's own answers, and at their ends.

A prompt is the unit of sampling: of every answer one figure is kept, the mean over its tokens, and
a figure is the mean of those over prompts with the standard error s / sqrt(P). With p and q the
reference's and the model's distributions of the next token, and E the tokens that end a turn:

    kl, delta_nll, top1    over the tokens of an answer, its end left out
    end_kl                 KL(p || q) where the reference ends its answer
    end_probability        q(E) there; ref_end_probability: p(E)
    early_end              1 - prod (1 - q(E)) over the tokens before: the probability that the
                           model, going along, would have ended sooner; ref_early_end with p

Answers that ran into the limit have no end, those that are nothing but their end no tokens.
"""

from collections.abc import Collection, Mapping, Sequence

import torch

from svsk_eval.chat.answers import Answer
from svsk_eval.chat.scores import SERIES, ChatScores
from svsk_eval.text.metrics import score_chunk
from svsk_eval.text.series import FloatArray
from svsk_offline.calibration.text import token_fingerprint

__all__ = ["ChatScores", "first_flip", "score_answer", "summarize_chat"]


def score_answer(
    logits: torch.Tensor, ref_logits: torch.Tensor, answer: Answer, ends: Collection[int]
) -> dict[str, float | None]:
    """The figures of one answer.

    Args:
        logits: the model's of the places that predict the answer's tokens and its end, [T, V].
        ref_logits: the reference's, [T, V].
        answer: T tokens, its end included.
        ends: the tokens that end a turn.

    Returns:
        The series of the top of this file by name; None where the answer has no end or no tokens.

    Raises:
        EvalError: the vocabularies differ, or a score is not finite.
    """
    targets = torch.tensor(answer.tokens[len(answer.prompt) :])
    scores = score_chunk(logits, targets, ref_logits)
    count = len(answer.answer)
    ending, ref_ending = _ending(logits, ends), _ending(ref_logits, ends)
    kept: dict[str, float | None] = dict.fromkeys(SERIES)
    assert scores.kl is not None, "there is a reference"
    if count:
        for name in ("nll", "ref_nll", "kl", "top1"):
            kept[name] = float(getattr(scores, name)[:count].mean())
        kept["early_end"] = float(1 - (1 - ending[:count]).prod())
        kept["ref_early_end"] = float(1 - (1 - ref_ending[:count]).prod())
    if answer.end is not None:
        kept["end_kl"] = float(scores.kl[-1])
        kept["end_probability"] = float(ending[-1])
        kept["ref_end_probability"] = float(ref_ending[-1])
    return kept


def first_flip(logits: torch.Tensor, ref_logits: torch.Tensor) -> int | None:
    """Places before the first at which the models' likeliest tokens differ; None if at none do.

    Args:
        logits: the model's, [T, V].
        ref_logits: the reference's, [T, V].
    """
    differ = (logits.argmax(-1) != ref_logits.argmax(-1)).nonzero()
    return int(differ[0]) if len(differ) else None


def summarize_chat(
    answers: Sequence[Answer],
    scores: Sequence[Mapping[str, float | None]],
    answer_tokens: int,
) -> ChatScores:
    """Put the figures of all answers together, in the order of the prompts.

    Args:
        answers: at least one.
        scores: results of :func:`score_answer`, one per answer.
        answer_tokens: most tokens of an answer, its end included.
    """
    hashed = [
        number
        for answer in answers
        for number in (len(answer.prompt), len(answer.answer), len(answer.tokens), *answer.tokens)
    ]
    return ChatScores(
        answers_fingerprint=token_fingerprint(torch.tensor(hashed)),
        prompts=len(answers),
        finished=sum(answer.end is not None for answer in answers),
        answer_tokens=answer_tokens,
        tokens=sum(len(answer.answer) for answer in answers),
        per_prompt={name: tuple(score[name] for score in scores) for name in SERIES},
    )


def _ending(logits: torch.Tensor, ends: Collection[int]) -> FloatArray:
    """Probability of all ends together at each place, float64 [T], of logits [T, V]."""
    normalised = logits.float().log_softmax(-1)[:, sorted(ends)]
    values: FloatArray = normalised.double().exp().sum(-1).clamp(max=1.0).cpu().numpy()
    return values
