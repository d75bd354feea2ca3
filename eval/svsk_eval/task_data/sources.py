# SPDX-License-Identifier: Apache-2.0
"""Where the documents of the tasks come from: the Hugging Face hub, or local files.

The hub is the default. If the environment variable ``SVSK_DATA`` names a folder, everything comes
from the files in it, as their authors publish them; what is missing there is an error and is not
taken from the hub. Both give the same columns, so that one task file serves both.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from svsk_eval.errors import EvalError
from svsk_eval.task_data.rows import ArcRow, Gsm8kRow, HellaSwagRow, HumanEvalRow, MbppRow, Row

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = [
    "BENCHMARKS",
    "DATA_VARIABLE",
    "Benchmark",
    "Split",
    "load_documents",
    "local_folder",
    "read_rows",
]

DATA_VARIABLE: Final = "SVSK_DATA"

_AGAIN: Final = "Take the file again from its authors, unchanged."

_MBPP_TEST: Final = range(11, 511)
_MBPP_EXAMPLES: Final = (2, 3, 4)
"""The examples of the MBPP paper's prompt, as lm-eval has them."""


@dataclass(frozen=True)
class Split:
    """One split of a benchmark.

    Attributes:
        file: name of the local file, which may also end in ``.gz``.
        row: its layout.
        hub: the hub's name of the split.
        keep: of the rows in the file or the hub's split, those that belong to this one.
        at_least: fewest rows that make sense.
        optional: a missing local file gives no rows: the split is only used where a run asks for
            solved examples that the task does not have by itself.
    """

    file: str
    row: type[Row]
    hub: str
    keep: Callable[[Mapping[str, Any]], bool] | None = None
    at_least: int = 1
    optional: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is found.

    Attributes:
        hub_path: its data set on the hub.
        hub_name: the configuration there.
        origin: where its authors publish the files.
        splits: by the name that the task file uses.
    """

    hub_path: str
    hub_name: str | None
    origin: str
    splits: Mapping[str, Split]


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    "humaneval": Benchmark(
        "openai/openai_humaneval",
        None,
        "https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)",
        {"test": Split("HumanEval.jsonl", HumanEvalRow, "test")},
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp",
        "full",
        "https://github.com/google-research/google-research/tree/master/mbpp (mbpp.jsonl)",
        {
            "test": Split("mbpp.jsonl", MbppRow, "test", lambda row: row["task_id"] in _MBPP_TEST),
            "fewshot": Split(
                "mbpp.jsonl", MbppRow, "prompt", lambda row: row["task_id"] in _MBPP_EXAMPLES, 3
            ),
        },
    ),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "main",
        "https://github.com/openai/grade-school-math (data/test.jsonl, and the first 2,000 lines of"
        " data/train.jsonl)",
        {
            "train": Split("gsm8k_train_2000.jsonl", Gsm8kRow, "train", at_least=5),
            "test": Split("gsm8k_test.jsonl", Gsm8kRow, "test"),
        },
    ),
    "arc_challenge": Benchmark(
        "allenai/ai2_arc",
        "ARC-Challenge",
        "https://allenai.org/data/arc (ARC-Challenge of ARC-V1-Feb2018)",
        {
            "train": Split("ARC-Challenge-Train.jsonl", ArcRow, "train", optional=True),
            "test": Split("ARC-Challenge-Test.jsonl", ArcRow, "test"),
        },
    ),
    "hellaswag": Benchmark(
        "Rowan/hellaswag",
        None,
        "https://github.com/rowanz/hellaswag (data/hellaswag_val.jsonl)",
        {
            "train": Split("hellaswag_train.jsonl", HellaSwagRow, "train", optional=True),
            "validation": Split("hellaswag_val.jsonl", HellaSwagRow, "validation"),
        },
    ),
}


def load_documents(name: str) -> "DatasetDict":
    """Load a benchmark's splits from the hub, or from the folder that ``SVSK_DATA`` names.

    Args:
        name: a key of :data:`BENCHMARKS`.

    Raises:
        EvalError: the hub cannot be reached, or a local file is missing or malformed.
    """
    from datasets import Dataset, DatasetDict

    benchmark = BENCHMARKS[name]
    folder = local_folder()
    if folder is None:
        return _from_hub(name, benchmark)
    found = {}
    for split, source in benchmark.splits.items():
        path = _local_file(folder, source.file, benchmark.origin, source.optional)
        rows = list(_checked(path, source)) if path is not None else []
        found[split] = Dataset.from_list(rows)
    return DatasetDict(found)


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


def read_rows(path: Path, row: type[Row]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Read a file of JSON lines, compressed with gzip if its name ends in ``.gz``.

    Args:
        path: the file.
        row: the layout of its lines.

    Yields:
        The number of the line, from 1, and the row in the hub's columns. Empty lines are passed
        over.

    Raises:
        EvalError: the file cannot be read, a line is no JSON or has another layout, or two lines
            have the same key.
    """
    seen: dict[Any, int] = {}
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                found = _parsed(path, number, line, row)
                if row.key is not None:
                    first = seen.setdefault(getattr(found, row.key), number)
                    if first != number:
                        shown = repr(getattr(found, row.key))
                        raise EvalError(
                            f"{path}, line {number}: {row.key} {shown} is that of line {first} too."
                            f" {_AGAIN}"
                        )
                yield number, found.to_hub()
    except (OSError, EOFError) as error:
        raise EvalError(f"{path}: cannot read it ({error}). {_AGAIN}") from error
    except UnicodeDecodeError as error:
        raise EvalError(f"{path}: not UTF-8 text ({error}). {_AGAIN}") from error


def _parsed(path: Path, number: int, line: str, row: type[Row]) -> Row:
    """The line as a row; raises EvalError with file, line, key, value and what was expected."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise EvalError(f"{path}, line {number}: not JSON ({error}). {_AGAIN}") from error
    try:
        return row.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the row"
        problem = first["msg"].removeprefix("Value error, ")
        shown = repr(first["input"])
        got = (
            ""
            if first["type"] in ("missing", "value_error")
            else f", got {shown[:80]}{'...' * (len(shown) > 80)}"
        )
        raise EvalError(f"{path}, line {number}: {where}: {problem}{got}. {_AGAIN}") from error


def _local_file(folder: Path, name: str, origin: str, optional: bool) -> Path | None:
    """The file, plain or compressed; None if it is optional and not there."""
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if len(found) == 2:
        raise EvalError(f"{folder}: holds both {name} and {name}.gz. Remove one of them.")
    if not found and not optional:
        raise EvalError(
            f"{folder}: has neither {name} nor {name}.gz, and {DATA_VARIABLE} names this folder."
            f" Put the file there (its authors publish it at {origin}), or unset {DATA_VARIABLE} to"
            " take it from the Hugging Face hub."
        )
    return found[0] if found else None


def _checked(path: Path, source: Split) -> Iterator[Mapping[str, Any]]:
    """The split's rows; raises EvalError after the last if there were too few."""
    count = 0
    for _, row in read_rows(path, source.row):
        if source.keep is None or source.keep(row):
            count += 1
            yield row
    if count < source.at_least:
        raise EvalError(
            f"{path}: has {count} row(s) of the split that is {source.hub!r} on the hub, expected"
            f" at least {source.at_least}. {_AGAIN}"
        )


def _from_hub(name: str, benchmark: Benchmark) -> "DatasetDict":
    """The hub's splits under our names.

    Raises EvalError with both ways out if they cannot be had.
    """
    import datasets

    shown = (
        benchmark.hub_path
        if benchmark.hub_name is None
        else f"{benchmark.hub_path} ({benchmark.hub_name})"
    )
    files = ", ".join(
        dict.fromkeys(split.file for split in benchmark.splits.values() if not split.optional)
    )
    try:
        loaded = datasets.load_dataset(benchmark.hub_path, benchmark.hub_name)
    # of datasets, huggingface_hub, httpx, pyarrow: which one depends on what is missing
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise EvalError(
            f"{name}: cannot load {shown} from the Hugging Face hub ({type(error).__name__}:"
            f" {reason}). Run it once with a network (and without HF_HUB_OFFLINE), which keeps a"
            f" copy; or set {DATA_VARIABLE} to a folder with {files} from {benchmark.origin}."
        ) from error
    found = {}
    for split, source in benchmark.splits.items():
        if source.hub not in loaded:
            raise EvalError(
                f"{name}: {shown} has the splits {', '.join(loaded)}, expected {source.hub!r}. Set"
                f" {DATA_VARIABLE} to a folder with {files} from {benchmark.origin}."
            )
        rows: Dataset = (
            loaded[source.hub] if source.keep is None else loaded[source.hub].filter(source.keep)
        )
        if len(rows) < source.at_least:
            raise EvalError(
                f"{name}: split {source.hub!r} of {shown} has {len(rows)} row(s) that fit, expected"
                f" at least {source.at_least}. Set {DATA_VARIABLE} to a folder with {files} from"
                f" {benchmark.origin}."
            )
        found[split] = rows
    return datasets.DatasetDict(found)
