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
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, field_validator

from svsk_eval.chat.answers import Answer
from svsk_eval.text.metrics import FloatArray, mean_se, score_chunk
from svsk_offline.calibration.text import token_fingerprint

__all__ = ["ChatScores", "Figure", "first_flip", "score_answer", "summarize_chat"]

_OVER_TOKENS: Final = ("nll", "ref_nll", "kl", "top1", "early_end", "ref_early_end")
_AT_THE_END: Final = ("end_kl", "end_probability", "ref_end_probability")
_SERIES: Final = (*_OVER_TOKENS, *_AT_THE_END)


@dataclass(frozen=True)
class Figure:
    """A mean over prompts.

    Attributes:
        mean: of all prompts that have the figure.
        se: its standard error; None with one prompt.
    """

    mean: float
    se: float | None


class ChatScores(BaseModel):
    """What ``svsk eval --chat --json`` writes of the answers under ``chat``.

    Attributes:
        answers_fingerprint: SHA-256 of the tokens of all prompts and answers, and of their numbers.
        prompts: how many, P.
        finished: how many of the answers ended by themselves.
        answer_tokens: most tokens of an answer, its end included.
        tokens: tokens of all answers, without their ends.
        per_prompt: figures by name, P each, see the top of this file; None where an answer has no
            end or no tokens. KL and NLL are in nats per token, the others 0 to 1.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    answers_fingerprint: str
    prompts: int
    finished: int
    answer_tokens: int
    tokens: int
    per_prompt: Mapping[str, tuple[float | None, ...]]

    @field_validator("per_prompt")
    @classmethod
    def _complete(cls, series: Mapping[str, tuple[float | None, ...]]) -> Any:
        if not set(_SERIES) <= set(series) or len(set(map(len, series.values()))) != 1:
            raise ValueError(f"expected {', '.join(_SERIES)}, as many values in every one")
        return series

    @property
    def series(self) -> dict[str, FloatArray]:
        """The figures per prompt and ``delta_nll``, float64 [P] each, NaN where there is none."""
        series = {name: np.array(values, np.float64) for name, values in self.per_prompt.items()}
        return {**series, "delta_nll": series["nll"] - series["ref_nll"]}

    def figures(self) -> dict[str, Figure]:
        """Mean and standard error of each series that any prompt has."""
        known = {name: values[~np.isnan(values)] for name, values in self.series.items()}
        return {
            name: Figure(float(values.mean()), mean_se(values[:, None]))
            for name, values in known.items()
            if len(values)
        }

    def to_json(self) -> dict[str, Any]:
        """What ``json`` can write: the fields, and each figure with its standard error."""
        flat: dict[str, Any] = {}
        for name, figure in self.figures().items():
            flat |= {name: figure.mean, f"{name}_se": figure.se}
        fields = self.model_dump(mode="json")
        per_prompt = fields.pop("per_prompt")
        return {**flat, **fields, "per_prompt": per_prompt}


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
    kept: dict[str, float | None] = dict.fromkeys(_SERIES)
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
        per_prompt={name: tuple(score[name] for score in scores) for name in _SERIES},
    )


def _ending(logits: torch.Tensor, ends: Collection[int]) -> FloatArray:
    """Probability of all ends together at each place, float64 [T], of logits [T, V]."""
    normalised = logits.float().log_softmax(-1)[:, sorted(ends)]
    values: FloatArray = normalised.double().exp().sum(-1).clamp(max=1.0).cpu().numpy()
    return values
