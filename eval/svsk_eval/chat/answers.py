# SPDX-License-Identifier: Apache-2.0
"""A model's own greedy answers to prompts of a chat, kept in a file for the next evaluation."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from svsk_eval.errors import EvalError, first_problem
from svsk_offline.storage.atomic import write_json

__all__ = ["Answer", "AnswerFile", "end_tokens", "greedy_answers", "load_answers"]

_BATCH: Final = 8
"""Prompts that are answered together. One number for all: rounding depends on it."""


class Answer(BaseModel):
    """A prompt and what the model says to it.

    Attributes:
        prompt: token ids, up to where the assistant begins.
        answer: token ids, without the one that ends it; maybe none.
        end: the token that ends it; None where the limit did.
        text: the answer to be read; nothing depends on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: tuple[NonNegativeInt, ...]
    answer: tuple[NonNegativeInt, ...]
    end: NonNegativeInt | None
    text: str = ""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.prompt or not (self.answer or self.end is not None):
            raise ValueError("expected a prompt, and an answer or its end")
        return self

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt, answer and its end."""
        return (*self.prompt, *self.answer, *(() if self.end is None else (self.end,)))


class AnswerFile(BaseModel):
    """Answers of one model by the prompts they are to.

    Attributes:
        reference: fingerprint of the model's folder.
        answer_tokens: most tokens of an answer, its end included.
        dtype: of the arithmetic, for the reader: answers are text, whatever made them.
        answers: by the fingerprint of the messages.
    """

    model_config = ConfigDict(extra="forbid")
    reference: str
    answer_tokens: int
    dtype: str
    answers: dict[str, Answer]

    def save(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        write_json(path, self.model_dump(mode="json"))


def load_answers(path: Path, reference: str, answer_tokens: int, dtype: str) -> AnswerFile:
    """Read a file of answers, or begin one if there is none.

    Args:
        path: the file.
        reference: fingerprint of the model that answers.
        answer_tokens: most tokens of an answer.
        dtype: of the arithmetic that makes further answers.

    Raises:
        EvalError: the file cannot be read, or holds another model's answers, or shorter or longer
            ones.
    """
    if not path.exists():
        return AnswerFile(reference=reference, answer_tokens=answer_tokens, dtype=dtype, answers={})
    try:
        file = AnswerFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EvalError(
            f"--answers {path}: cannot be read ({error.strerror}). Name a file that `svsk eval"
            " --chat` wrote, or a new one."
        ) from error
    except ValidationError as error:
        raise EvalError(
            f"--answers {path}: not a file of answers as `svsk eval --chat --answers` writes it:"
            f" {first_problem(error)}. Name another file."
        ) from error
    again = "Name another file, or remove this one."
    if file.reference != reference:
        raise EvalError(
            f"--answers {path}: holds answers of another reference (its files' SHA-256 is"
            f" {file.reference[:16]}, that of the one given {reference[:16]}). {again}"
        )
    if file.answer_tokens != answer_tokens:
        raise EvalError(
            f"--answers {path}: holds answers of up to {file.answer_tokens} tokens,"
            f" --answer-tokens is {answer_tokens}. {again}"
        )
    return file


def end_tokens(model: Any, tokenizer: Any, path: str | Path) -> list[int]:
    """The tokens that end an answer where the model is served, ascending.

    Those are the ones of its generation settings and the tokenizer's end of a sequence.

    Args:
        model: loaded by transformers.
        tokenizer: the model's.
        path: of the model, for errors.

    Raises:
        EvalError: there are none.
    """
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = set(declared if isinstance(declared, list | tuple) else [declared])
    ends = {end for end in ends | {tokenizer.eos_token_id} if end is not None}
    if not ends:
        raise EvalError(
            f"{path}: neither generation_config.json nor the tokenizer names a token that ends an"
            " answer (eos_token_id), so every answer would run to the limit. Name it there."
        )
    return sorted(ends)


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[int]],
    ends: Collection[int],
    answer_tokens: int,
    done: Callable[[dict[str, Answer]], None],
) -> None:
    """Answer prompts, the likeliest token after the other: no penalty, no sampling.

    Prompts of similar length are answered together, padded on the left. Which ones are in a batch
    changes rounding, and with it perhaps an answer whose two likeliest tokens are as good as equal.

    Args:
        model: loaded by transformers; its generation settings are replaced.
        tokenizer: for the text of the answers.
        prompts: token ids by the prompt's fingerprint.
        ends: the tokens that end an answer.
        answer_tokens: most tokens of an answer, its end included.
        done: called with the answers of each batch.
    """
    any_model: Any = model
    # Whatever is not said here, generate() takes from the model's own settings, and they may hold
    # a penalty of repetition or a least length.
    any_model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=answer_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    order = sorted(prompts, key=lambda name: len(prompts[name]))
    for start in range(0, len(order), _BATCH):
        names = order[start : start + _BATCH]
        width = max(len(prompts[name]) for name in names)
        ids = torch.full((len(names), width), min(ends))
        mask = torch.zeros_like(ids)
        for row, name in enumerate(names):
            ids[row, width - len(prompts[name]) :] = torch.tensor(prompts[name])
            mask[row, width - len(prompts[name]) :] = 1
        where = any_model.device
        output = any_model.generate(input_ids=ids.to(where), attention_mask=mask.to(where))
        rows = output[:, width:].tolist()
        done(
            {
                name: _answer(prompts[name], row, ends, tokenizer)
                for name, row in zip(names, rows, strict=True)
            }
        )


def _answer(
    prompt: Sequence[int], row: Sequence[int], ends: Collection[int], tokenizer: Any
) -> Answer:
    """An answer of a row of generated tokens, behind whose end is padding."""
    length = next((place for place, token in enumerate(row) if token in ends), len(row))
    end = row[length] if length < len(row) else None
    text = str(tokenizer.decode(row[:length], skip_special_tokens=False))
    return Answer(prompt=tuple(prompt), answer=tuple(row[:length]), end=end, text=text)
