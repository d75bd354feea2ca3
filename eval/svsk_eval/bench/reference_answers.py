# SPDX-License-Identifier: Apache-2.0
"""How far is a variant from the reference on the reference's own answers to a task?

The reference's worker keeps the tokens of its answers to the first items. Then both models read
prompt and answer, with transformers, on dequantised weights, and are compared token by token as
``svsk eval --chat`` does. ``python -m svsk_eval.bench.reference_answers`` does it for one variant,
in a process of its own.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer

from svsk_eval.chat.answers import Answer, end_tokens
from svsk_eval.chat.metrics import first_flip, score_answer
from svsk_eval.errors import EvalError
from svsk_eval.processes import answer_request
from svsk_eval.report.schema import ReferenceAnswers
from svsk_eval.text.models import check_same_vocabulary, declared_limits, load_model
from svsk_offline.storage.atomic import write_text

__all__ = ["LONGEST", "AnswersRequest", "TaskAnswers", "collect", "main", "score_task"]

LONGEST: Final = 1024
"""Tokens of an answer that are scored: the logits of all are in memory together."""


class TaskAnswers(BaseModel):
    """A model's answers to the first items of a task, as tokens.

    Attributes:
        task: its name.
        doc_ids: numbers of the items.
        prompts: token ids as the engine was given them, one list for each item.
        answers: token ids that were generated, what ended an answer among them.
        left_out: items whose answer has no tokens here, or does not fit the model's context.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    doc_ids: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    left_out: int


class AnswersRequest(BaseModel):
    """What is to be scored.

    Attributes:
        model: folder of the variant.
        reference: folder of the model that answered.
        answers: files of :class:`TaskAnswers`.
        folder: gets ``scores-TASK.json`` for each, a
            :class:`svsk_eval.report.schema.ReferenceAnswers`.
        dtype: of the arithmetic, torch's name, or ``auto`` as ``svsk eval`` takes it.
        device: torch's name, or None.
        trust_remote_code: run Python files that come with the models.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: Path
    reference: Path
    answers: tuple[Path, ...]
    folder: Path
    dtype: str
    device: str | None
    trust_remote_code: bool


def collect(
    name: str, model: Any, samples: Sequence[Mapping[str, Any]], longest: int
) -> TaskAnswers:
    """Take the answers that a model of lm-eval has just given, with their tokens.

    Args:
        name: of the task.
        model: the :class:`svsk_eval.bench.journaled_model.JournaledModel` that answered.
        samples: lm-eval's, of the items in question; the first answer to each is taken.
        longest: tokens that prompt and answer may have together.
    """
    doc_ids, prompts, answers = [], [], []
    for sample in samples:
        prompt, settings = sample["arguments"][0]
        (given,) = model.generated([(prompt, settings)])
        tokens = tuple(model.tok_encode(prompt))
        if given.ids and tokens and len(tokens) + len(given.ids) <= longest:
            doc_ids.append(int(sample["doc_id"]))
            prompts.append(tokens)
            answers.append(given.ids)
    return TaskAnswers(
        task=name,
        doc_ids=tuple(doc_ids),
        prompts=tuple(prompts),
        answers=tuple(answers),
        left_out=len(samples) - len(doc_ids),
    )


@torch.inference_mode()
def score_task(
    model: Any,
    reference: Any,
    answers: TaskAnswers,
    ends: Sequence[int],
    progress: Callable[[], None] = lambda: None,
) -> ReferenceAnswers:
    """Score both models on answers of the reference.

    Args:
        model: the variant, loaded by transformers.
        reference: the same of the model that answered.
        answers: to one task.
        ends: tokens that end an answer.
        progress: called after every answer.

    Raises:
        EvalError: the vocabularies differ, or a score is not finite.
    """
    rows: list[dict[str, float | None]] = []
    tokens = []
    for prompt, ids in zip(answers.prompts, answers.answers, strict=True):
        kept = ids[:LONGEST]
        ended = kept[-1] in ends
        answer = Answer(
            prompt=prompt,
            answer=kept[:-1] if ended else kept,
            end=kept[-1] if ended else None,
        )
        read = torch.tensor([answer.tokens])
        places = slice(len(prompt) - 1, -1)
        logits, ref_logits = (
            one(input_ids=read.to(one.device), use_cache=False).logits[0, places]
            for one in (model, reference)
        )
        count = len(answer.answer)
        flip = first_flip(logits[:count], ref_logits[:count])
        rows.append({**score_answer(logits, ref_logits, answer, ends), "first_flip": flip})
        tokens.append(count)
        progress()
    names = rows[0] if rows else {}
    return ReferenceAnswers(
        answers_fingerprint=_fingerprint(answers),
        doc_ids=answers.doc_ids,
        tokens=tuple(tokens),
        per_item={name: tuple(row[name] for row in rows) for name in names},
        left_out=answers.left_out,
    )


def _fingerprint(answers: TaskAnswers) -> str:
    """SHA-256 of the tokens of all prompts and answers."""
    tokens = answers.model_dump_json(include={"prompts", "answers"})
    return hashlib.sha256(tokens.encode()).hexdigest()


def main(request_file: Path, report: Callable[..., None]) -> None:
    """Score a request's answers; ``report`` gets the answers ``done`` and the ``total``."""
    request = AnswersRequest.model_validate_json(request_file.read_bytes())
    limits = [
        declared_limits(path, trust_remote_code=request.trust_remote_code)
        for path in (request.model, request.reference)
    ]
    check_same_vocabulary(request.model, limits[0][0], request.reference, limits[1][0])
    tasks = [TaskAnswers.model_validate_json(path.read_bytes()) for path in request.answers]
    empty = [task.task for task in tasks if not task.doc_ids]
    if empty:
        raise EvalError(
            f"--reference-answers: no answer to {', '.join(empty)} can be scored: those of earlier"
            " versions were kept without tokens, or all are longer than the model's context. Take"
            " another --work-dir, or leave the option out."
        )
    load = partial(
        load_model,
        device=request.device,
        dtype=None if request.dtype == "auto" else request.dtype,
        trust_remote_code=request.trust_remote_code,
    )
    reference, model = load(str(request.reference)), load(str(request.model))
    tokenizer: Any = AutoTokenizer.from_pretrained(
        request.reference, trust_remote_code=request.trust_remote_code
    )
    ends = end_tokens(reference, tokenizer, request.reference)
    done, total = 0, sum(len(task.doc_ids) for task in tasks)

    def tell() -> None:
        nonlocal done
        done += 1
        report(done=done, total=total)

    for task in tasks:
        scores = score_task(model, reference, task, ends, tell)
        write_text(request.folder / f"scores-{task.task}.json", scores.model_dump_json(indent=1))


if __name__ == "__main__":
    answer_request(main)
