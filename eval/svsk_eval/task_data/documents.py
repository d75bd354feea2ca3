# SPDX-License-Identifier: Apache-2.0
"""The documents of the tasks: from the Hugging Face hub, from local files, or shipped with them.

The hub is the default. If the environment variable ``SVSK_DATA`` names a folder, the public
benchmarks come from the files in it, as their authors publish them. What is missing there is an
error and is not taken from the hub. Both give the same columns, so that one task file serves both.

A task file names :func:`benchmark_documents` or :func:`shipped_documents` as its
``custom_dataset``, and says under ``dataset_kwargs`` which documents it wants.
"""

import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from svsk_eval.errors import EvalError
from svsk_eval.task_data.code_tasks import require_sandbox
from svsk_eval.task_data.folder import tasks_folder
from svsk_eval.task_data.instructions import require_checkers

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = [
    "BENCHMARKS",
    "DATA_VARIABLE",
    "Benchmark",
    "Split",
    "benchmark_documents",
    "local_folder",
    "shipped_documents",
]

DATA_VARIABLE: Final = "SVSK_DATA"

_AGAIN: Final = "Take the file again from its authors, unchanged."


@dataclass(frozen=True)
class Split:
    """One split of a benchmark.

    Attributes:
        hub: the hub's name of the split.
        file: name of the local file, which may also end in ``.gz``.
        task_ids: of the rows there, those that belong to this split; None is all.
        at_least: fewest rows that make sense.
        optional: a missing local file gives no rows: the split is only used where a run asks for
            solved examples that the task does not have by itself.
    """

    hub: str
    file: str
    task_ids: Container[int] | None = None
    at_least: int = 1
    optional: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is found.

    Attributes:
        hub: its data set on the hub and, if there are several, the configuration there.
        origin: where its authors publish the files.
        columns: the hub's columns that tasks use, with the type of their values.
        splits: by the name that the task file uses.
        to_hub: brings a row of the authors' file into the hub's columns, None if it has them.
        scorer: refuses, given the benchmark's name, where answers could not be scored; None if
            they always can.
    """

    hub: tuple[str, ...]
    origin: str
    columns: Mapping[str, type]
    splits: Mapping[str, Split]
    to_hub: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    scorer: Callable[[str], None] | None = None


def _arc_to_hub(row: Mapping[str, Any]) -> dict[str, Any]:
    """AI2's question is nested, and has a list of choices instead of two lists of their parts."""
    choices = row["question"]["choices"]
    columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    if row["answerKey"] not in columns["label"]:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {columns['label']}")
    return {**row, "question": row["question"]["stem"], "choices": columns}


def _hellaswag_to_hub(row: Mapping[str, Any]) -> dict[str, Any]:
    """On the hub ``label`` is text; WikiHow's rows may lack the two parts of ``ctx``."""
    if row["label"] not in range(4):
        raise ValueError(f"label is {row['label']!r}, expected 0, 1, 2 or 3")
    parts = {key: row.get(key) or "" for key in ("ctx_a", "ctx_b")}
    return {**row, **parts, "label": str(row["label"])}


def _ifeval_to_hub(row: Mapping[str, Any]) -> dict[str, Any]:
    """Each instruction has its arguments."""
    names, arguments = row["instruction_id_list"], row["kwargs"]
    if not names or len(names) != len(arguments):
        raise ValueError(
            f"{len(names)} instructions with {len(arguments)} sets of arguments, expected as many,"
            " and one or more"
        )
    return dict(row)


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    "humaneval": Benchmark(
        ("openai/openai_humaneval",),
        "https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)",
        dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), str),
        {"test": Split("test", "HumanEval.jsonl")},
        scorer=require_sandbox,
    ),
    "mbpp": Benchmark(
        ("google-research-datasets/mbpp", "full"),
        "https://github.com/google-research/google-research/tree/master/mbpp (mbpp.jsonl)",
        {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
        {
            "test": Split("test", "mbpp.jsonl", range(11, 511)),
            # the examples of the MBPP paper's prompt, as lm-eval has them
            "fewshot": Split("prompt", "mbpp.jsonl", (2, 3, 4), at_least=3),
        },
        scorer=require_sandbox,
    ),
    "gsm8k": Benchmark(
        ("openai/gsm8k", "main"),
        "https://github.com/openai/grade-school-math (data/test.jsonl, and the first 2,000 lines of"
        " data/train.jsonl)",
        {"question": str, "answer": str},
        {
            # five: the solved examples of the prompt
            "train": Split("train", "gsm8k_train_2000.jsonl", at_least=5),
            "test": Split("test", "gsm8k_test.jsonl"),
        },
    ),
    "arc_challenge": Benchmark(
        ("allenai/ai2_arc", "ARC-Challenge"),
        "https://allenai.org/data/arc (ARC-Challenge of ARC-V1-Feb2018)",
        {"id": str, "question": str, "choices": dict, "answerKey": str},
        {
            "train": Split("train", "ARC-Challenge-Train.jsonl", optional=True),
            "test": Split("test", "ARC-Challenge-Test.jsonl"),
        },
        to_hub=_arc_to_hub,
    ),
    "hellaswag": Benchmark(
        ("Rowan/hellaswag",),
        "https://github.com/rowanz/hellaswag (data/hellaswag_val.jsonl)",
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
        {
            "train": Split("train", "hellaswag_train.jsonl", optional=True),
            "validation": Split("validation", "hellaswag_val.jsonl"),
        },
        to_hub=_hellaswag_to_hub,
    ),
    "ifeval": Benchmark(
        ("google/IFEval",),
        "https://github.com/google-research/google-research/tree/master/"
        "instruction_following_eval (data/input_data.jsonl, renamed ifeval.jsonl)",
        {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
        {"test": Split("train", "ifeval.jsonl")},
        to_hub=_ifeval_to_hub,
        scorer=require_checkers,
    ),
}


def benchmark_documents(benchmark: str, **_: object) -> "DatasetDict":
    """Load a benchmark's splits from the hub, or from the folder that ``SVSK_DATA`` names.

    Args:
        benchmark: a key of :data:`BENCHMARKS`.

    Raises:
        EvalError: the hub cannot be reached; a local file is missing or damaged; or answers cannot
            be scored: the task runs code, without consent or a sandbox, or a package is missing.
    """
    from datasets import DatasetDict

    source = BENCHMARKS[benchmark]
    if source.scorer is not None:
        source.scorer(benchmark)
    folder = local_folder()
    if folder is None:
        return _from_hub(benchmark, source)
    paths = {
        name: _local_file(folder, split, source.origin) for name, split in source.splits.items()
    }
    return DatasetDict(
        {name: _read(path, source, source.splits[name]) for name, path in paths.items()}
    )


def shipped_documents(file: str, **_: object) -> "DatasetDict":
    """Load the split ``test`` from ``data/FILE`` beside the task files.

    Raises:
        EvalError: the file is missing or damaged.
    """
    from datasets import DatasetDict

    return DatasetDict({"test": _read_json(tasks_folder() / "data" / file)})


def local_folder() -> Path | None:
    """The folder that ``SVSK_DATA`` names, None if the variable is not set or empty.

    Raises:
        EvalError: it is not a folder.
    """
    value = os.environ.get(DATA_VARIABLE, "")
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise EvalError(
            f"{DATA_VARIABLE} is {value!r}, which is not a folder. Name the folder of the"
            " benchmarks' files, or unset it to take them from the Hugging Face hub."
        )
    return folder


def _local_file(folder: Path, split: Split, origin: str) -> Path | None:
    """The file, plain or compressed; None if it is optional and not there."""
    name = split.file
    paths = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if len(paths) == 2:
        raise EvalError(f"{folder}: holds both {name} and {name}.gz. Remove one of them.")
    if not paths and not split.optional:
        raise EvalError(
            f"{folder}: has neither {name} nor {name}.gz, and {DATA_VARIABLE} names this folder."
            f" Put the file there (its authors publish it at {origin}), or unset {DATA_VARIABLE} to"
            " take it from the Hugging Face hub."
        )
    return paths[0] if paths else None


def _read(path: Path | None, source: Benchmark, split: Split) -> "Dataset":
    """A local file's rows of a split, in the hub's columns."""
    from datasets import Dataset

    if path is None:
        return Dataset.from_list([])
    rows = []
    for number, row in enumerate(_read_json(path), start=1):
        try:
            converted = source.to_hub(row) if source.to_hub is not None else row
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EvalError(f"{path}, row {number}: {error!r}. {_AGAIN}") from error
        for column, kind in source.columns.items():
            value = converted.get(column)
            if not isinstance(value, kind):
                raise EvalError(
                    f"{path}, row {number}: {column} is {str(value)[:80]!r}, expected"
                    f" {kind.__name__}. {_AGAIN}"
                )
        rows.append({column: converted[column] for column in source.columns})
    return _of_split(Dataset.from_list(rows), split, str(path), _AGAIN)


def _read_json(path: Path) -> "Dataset":
    """The rows of a file of JSON lines, plain or compressed."""
    from datasets import load_dataset

    try:
        return load_dataset("json", data_files=str(path), split="train")
    # of datasets, pyarrow, gzip: which one depends on the damage; an empty file is a StopIteration
    except Exception as error:
        cause = error.__cause__ or error
        raise EvalError(
            f"{path}: cannot read rows of JSON from it ({type(cause).__name__}: {_line(cause)})."
            f" {_AGAIN}"
        ) from error


def _from_hub(name: str, source: Benchmark) -> "DatasetDict":
    """The hub's splits under our names."""
    import datasets

    data_set = source.hub[0] + "".join(f" ({part})" for part in source.hub[1:])
    files = ", ".join(
        dict.fromkeys(split.file for split in source.splits.values() if not split.optional)
    )
    local = f"et {DATA_VARIABLE} to a folder with {files} from {source.origin}."
    try:
        loaded = datasets.load_dataset(*source.hub)
    # of datasets, huggingface_hub, httpx, pyarrow: which one depends on what is missing
    except Exception as error:
        raise EvalError(
            f"{name}: cannot load {data_set} from the Hugging Face hub ({type(error).__name__}:"
            f" {_line(error)}). Run it once with a network (and without HF_HUB_OFFLINE), which"
            f" keeps a copy; or s{local}"
        ) from error
    splits = {}
    for ours, split in source.splits.items():
        if split.hub not in loaded:
            raise EvalError(
                f"{name}: {data_set} has the splits {', '.join(loaded)}, expected {split.hub!r}."
                f" S{local}"
            )
        splits[ours] = _of_split(loaded[split.hub], split, data_set, f"S{local}")
    return datasets.DatasetDict(splits)


def _of_split(rows: "Dataset", split: Split, origin: str, advice: str) -> "Dataset":
    """The rows that belong to a split; EvalError if there are too few."""
    if split.task_ids is not None and len(rows):
        rows = rows.select(
            [index for index, number in enumerate(rows["task_id"]) if number in split.task_ids]
        )
    if len(rows) < split.at_least:
        raise EvalError(
            f"{origin}: has {len(rows)} row(s) of the split that is {split.hub!r} on the hub,"
            f" expected at least {split.at_least}. {advice}"
        )
    return rows


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0]
