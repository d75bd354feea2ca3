# SPDX-License-Identifier: Apache-2.0
"""The functions that the task files name as ``custom_dataset``.

lm-eval calls them with the task's metadata as keyword arguments, which they do not need.
"""

from typing import TYPE_CHECKING

from svsk_eval.task_data.code_tasks import require_sandbox
from svsk_eval.task_data.folder import tasks_folder
from svsk_eval.task_data.rows import Row, SmokeChoiceRow, SmokeTextRow
from svsk_eval.task_data.sources import load_documents, read_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = [
    "arc_challenge",
    "gsm8k",
    "hellaswag",
    "humaneval",
    "mbpp",
    "smoke_arithmetic",
    "smoke_copy",
    "smoke_facts",
    "smoke_python",
]


def humaneval(**_: object) -> "DatasetDict":
    """Split ``test``, 164 problems.

    Raises:
        EvalError: no consent to running code, no sandbox or no data; see
            :func:`svsk_eval.task_data.load_documents`.
    """
    require_sandbox("HumanEval")
    return load_documents("humaneval")


def mbpp(**_: object) -> "DatasetDict":
    """Splits ``test``, 500 problems, and ``fewshot``, the three of the prompt.

    Raises:
        EvalError: no consent to running code, no sandbox or no data; see
            :func:`svsk_eval.task_data.load_documents`.
    """
    require_sandbox("MBPP")
    return load_documents("mbpp")


def gsm8k(**_: object) -> "DatasetDict":
    """Splits ``train`` and ``test``, 1,319 problems. Raises EvalError without data."""
    return load_documents("gsm8k")


def arc_challenge(**_: object) -> "DatasetDict":
    """Splits ``train`` and ``test``, 1,172 questions. Raises EvalError without data."""
    return load_documents("arc_challenge")


def hellaswag(**_: object) -> "DatasetDict":
    """Splits ``train`` and ``validation``, 10,042 items. Raises EvalError without data."""
    return load_documents("hellaswag")


def smoke_facts(**_: object) -> "DatasetDict":
    """Split ``test``, written for this project."""
    return _shipped("facts", SmokeChoiceRow)


def smoke_python(**_: object) -> "DatasetDict":
    """Split ``test``, made by data/make.py."""
    return _shipped("python", SmokeChoiceRow)


def smoke_arithmetic(**_: object) -> "DatasetDict":
    """Split ``test``, made by data/make.py."""
    return _shipped("arithmetic", SmokeTextRow)


def smoke_copy(**_: object) -> "DatasetDict":
    """Split ``test``, made by data/make.py."""
    return _shipped("copy", SmokeTextRow)


def _shipped(name: str, row: type[Row]) -> "DatasetDict":
    """A data file beside the task files."""
    from datasets import Dataset, DatasetDict

    rows = [found for _, found in read_rows(tasks_folder() / "data" / f"{name}.jsonl", row)]
    return DatasetDict({"test": Dataset.from_list(rows)})
