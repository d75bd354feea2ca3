# SPDX-License-Identifier: Apache-2.0
"""A few rows of every benchmark: files in their authors' layouts, and the hub's copies."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from svsk_eval.task_data.documents import DATA_VARIABLE

Rows = list[dict[str, Any]]

HUMANEVAL: Rows = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(x):\n    """{text}"""\n',
        "canonical_solution": f"    return x {operator} {number}\n",
        "test": f"def check(candidate):\n    assert candidate(5) == 5 {operator} {number}\n",
        "entry_point": name,
    }
    for number, name, text, operator in [
        (2, "twice", "Double x.", "*"),
        (3, "plus_three", "Add {{3}} to x.", "+"),
    ]
]

MBPP: Rows = [
    {
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "task_id": number,
        "test_setup_code": "start = 1" if number == 12 else "",
        "test_list": (
            [f"assert add({x}) == {x + number}" for x in range(2)]
            + [f"assert add({'start' if number == 12 else 1}) == {1 + number}"]
        ),
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 10, 11, 12, 510, 511, 974)
]

GSM8K: Rows = [
    {
        "question": f"What is {n} and {n}?",
        "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}",
    }
    for n in range(1, 9)
]

ARC: Rows = [
    {
        "id": f"Q_{number}",
        "question": {
            "stem": stem,
            "choices": [
                {"text": text, "label": label} for label, text in zip(labels, texts, strict=True)
            ],
        },
        "answerKey": key,
    }
    for number, (stem, labels, texts, key) in enumerate(
        [
            ("What is wet?", "ABCD", ["fire", "water", '"sand"', "it's air"], "B"),
            ("Which is a metal?", "123", ["wood", "tin", "wax"], "2"),
        ]
    )
]

HELLASWAG: Rows = [
    {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "split": "val",
        "split_type": "indomain",
        "label": 3,
        "endings": [
            "sleeps there.",
            "is a roof.",
            "[substeps] flies  away.",
            "starts pulling up roofing.",
        ],
        "source_id": "activitynet~v_x",
    },
    {
        "ind": 30,
        "activity_label": "Finance",
        "ctx": "[header] How to save [title] Look at it. [step] Be calm.",
        "ctx_a": "[header] How to save [title] Look at it. [step] Be calm.",
        "split": "val",
        "split_type": "zeroshot",
        "label": 0,
        "endings": ["Spend less.", "Spend more.", "Eat it.", "Sing."],
        "source_id": "wikihow~1",
    },
]

IFEVAL: Rows = [
    {
        "key": 1000,
        "prompt": "Write {{two}} lines without a comma.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "less than", "num_words": 20}],
    },
    {
        "key": 1001,
        "prompt": "Answer in 3 sentences or more.",
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"relation": "at least", "num_sentences": 3}],
    },
]

FILES: Mapping[str, Rows] = {
    "HumanEval.jsonl.gz": HUMANEVAL,
    "mbpp.jsonl": MBPP,
    "gsm8k_test.jsonl": GSM8K[5:],
    "gsm8k_train_2000.jsonl": GSM8K[:6],
    "ARC-Challenge-Test.jsonl": ARC,
    "hellaswag_val.jsonl": HELLASWAG,
    "ifeval.jsonl": IFEVAL,
}


def write_rows(path: Path, rows: Rows) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_files(folder: Path) -> Path:
    """Every benchmark's files in its authors' layout."""
    folder.mkdir(exist_ok=True)
    for name, rows in FILES.items():
        write_rows(folder / name, rows)
    return folder


def hub_copies() -> dict[str, DatasetDict]:
    """The same documents by the hub's path, in its splits and columns, converted by hand."""
    arc = [
        {
            "id": "Q_0",
            "question": "What is wet?",
            "answerKey": "B",
            "choices": {
                "text": ["fire", "water", '"sand"', "it's air"],
                "label": ["A", "B", "C", "D"],
            },
        },
        {
            "id": "Q_1",
            "question": "Which is a metal?",
            "answerKey": "2",
            "choices": {"text": ["wood", "tin", "wax"], "label": ["1", "2", "3"]},
        },
    ]
    hellaswag = [{"ctx_b": "", **row, "label": str(row["label"])} for row in HELLASWAG]
    mbpp = {
        "prompt": [row for row in MBPP if row["task_id"] <= 10],
        "test": [row for row in MBPP if 11 <= row["task_id"] <= 510],
        "validation": [row for row in MBPP if row["task_id"] == 511],
        "train": [row for row in MBPP if row["task_id"] == 974],
    }
    copies: dict[str, dict[str, Rows]] = {
        "openai/openai_humaneval": {"test": HUMANEVAL},
        "google-research-datasets/mbpp": mbpp,
        "openai/gsm8k": {"train": GSM8K[:6], "test": GSM8K[5:]},
        "allenai/ai2_arc": {"train": arc, "validation": arc, "test": arc},
        "Rowan/hellaswag": {"train": hellaswag, "validation": hellaswag, "test": hellaswag},
        "google/IFEval": {"train": IFEVAL},
    }
    return {
        path: DatasetDict({k: Dataset.from_list(v) for k, v in splits.items()})
        for path, splits in copies.items()
    }


def use_hub(
    monkeypatch: pytest.MonkeyPatch, copies: Mapping[str, DatasetDict]
) -> list[tuple[str, str | None]]:
    """Let ``datasets`` load these, and return the list of what it was requested for."""
    requested: list[tuple[str, str | None]] = []

    read_files = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if path == "json":
            return read_files(path, name, **options)
        requested.append((path, name))
        return copies[path]

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requested
