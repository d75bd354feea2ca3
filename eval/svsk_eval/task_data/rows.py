# SPDX-License-Identifier: Apache-2.0
"""The rows of public benchmarks as their authors publish them, brought into the columns of the Hugging Face hub."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ArcRow",
    "Gsm8kRow",
    "HellaSwagRow",
    "HumanEvalRow",
    "MbppRow",
    "Row",
    "SmokeChoiceRow",
    "SmokeTextRow",
]

_GSM8K_RESULT: Final = re.compile(r"#### -?[\d.,]+\s*$")

Text = Annotated[str, Field(min_length=1)]


class Row(BaseModel):
    """One line of a file. Keys that are not declared are ignored: releases differ in them.

    Attributes:
        key: the field that tells rows of one file apart, None where the layout has none.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")
    key: ClassVar[str | None] = None

    def to_hub(self) -> Mapping[str, Any]:
        """The row in the hub's columns."""
        return self.model_dump()


class HumanEvalRow(Row):
    """A line of HumanEval.jsonl.gz; the hub has the same columns."""

    key: ClassVar[str | None] = "task_id"
    task_id: Text
    prompt: Text
    canonical_solution: str
    test: Text
    entry_point: Text

    @model_validator(mode="after")
    def _is_runnable(self) -> "HumanEvalRow":
        if f"def {self.entry_point}(" not in self.prompt:
            raise ValueError(
                f"prompt does not define the function that entry_point names, {self.entry_point!r}"
            )
        if "def check(" not in self.test:
            raise ValueError("test does not define the function check(candidate)")
        return self


class MbppRow(Row):
    """A line of Google's mbpp.jsonl; the hub's configuration ``full`` has the same columns."""

    key: ClassVar[str | None] = "task_id"
    task_id: int
    text: Text
    code: Text
    test_setup_code: str = ""
    test_list: Annotated[list[Text], Field(min_length=3)]
    challenge_test_list: list[str] = []


class Gsm8kRow(Row):
    """A line of OpenAI's train.jsonl or test.jsonl; the hub has the same columns."""

    question: Text
    answer: Text

    @model_validator(mode="after")
    def _has_a_result(self) -> "Gsm8kRow":
        if not _GSM8K_RESULT.search(self.answer):
            raise ValueError(
                f"answer does not end with '#### ' and a number, it ends with {self.answer[-20:]!r}"
            )
        return self


class _ArcChoice(Row):
    text: Text
    label: Text


class _ArcQuestion(Row):
    stem: Text
    choices: Annotated[list[_ArcChoice], Field(min_length=2)]


class ArcRow(Row):
    """A line of AI2's ARC-Challenge-*.jsonl, whose question is nested.

    The hub's columns are flat.
    """

    id: Text
    question: _ArcQuestion
    answerKey: Text  # noqa: N815 - AI2's name

    @model_validator(mode="after")
    def _has_its_answer(self) -> "ArcRow":
        labels = [choice.label for choice in self.question.choices]
        if labels.count(self.answerKey) != 1:
            raise ValueError(
                f"answerKey is {self.answerKey!r}, which is not one of the labels"
                f" {', '.join(labels)}"
            )
        return self

    def to_hub(self) -> Mapping[str, Any]:
        """Columns id, question, choices (text and label, one entry per choice) and answerKey."""
        choices = self.question.choices
        columns = {
            "text": [choice.text for choice in choices],
            "label": [choice.label for choice in choices],
        }
        return {
            "id": self.id,
            "question": self.question.stem,
            "choices": columns,
            "answerKey": self.answerKey,
        }


class HellaSwagRow(Row):
    """A line of hellaswag_*.jsonl.

    On the hub ``label`` is text. WikiHow rows may lack ``ctx_a`` and ``ctx_b``.
    """

    ind: int
    activity_label: str
    ctx_a: str = ""
    ctx_b: str = ""
    ctx: Text
    endings: Annotated[list[Text], Field(min_length=4, max_length=4)]
    source_id: str = ""
    split: str = ""
    split_type: str = ""
    label: Annotated[int, Field(ge=0, le=3)]

    def to_hub(self) -> Mapping[str, Any]:
        """The same columns, ``label`` as text."""
        return {**self.model_dump(), "label": str(self.label)}


class SmokeChoiceRow(Row):
    """A multiple-choice item of the smoke tasks."""

    key: ClassVar[str | None] = "question"
    question: Text
    choices: Annotated[list[Text], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]


class SmokeTextRow(Row):
    """An item of the smoke tasks whose answer the model writes."""

    key: ClassVar[str | None] = "question"
    question: Text
    answer: Text
