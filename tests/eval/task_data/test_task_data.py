# SPDX-License-Identifier: Apache-2.0
"""Documents of the tasks.

Local files in their authors' layouts, the hub, and what is wrong with either.
"""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from svsk_eval.errors import EvalError
from svsk_eval.task_data.documents import (
    BENCHMARKS,
    DATA_VARIABLE,
    benchmark_documents,
    local_folder,
)
from tests.eval.support import published_file
from tests.eval.task_data.benchmark_files import (
    ARC,
    FILES,
    GSM8K,
    HELLASWAG,
    HUMANEVAL,
    IFEVAL,
    MBPP,
    Rows,
    hub_copies,
    use_hub,
    write_files,
    write_rows,
)
from tests.eval.task_data.stand_in import install_stand_in


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consent, and a sandbox for tests: HumanEval and MBPP are not loaded without."""
    install_stand_in(monkeypatch)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``SVSK_DATA`` names a folder with all files."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    return write_files(tmp_path / "data")


class TestLocalFiles:
    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_give_the_rows_of_the_hub(
        self, name: str, local: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours = benchmark_documents(name)
        use_hub(monkeypatch, hub_copies())
        theirs = benchmark_documents(name)
        assert set(ours) == set(theirs) == set(BENCHMARKS[name].splits)
        for split in ours:
            if BENCHMARKS[name].splits[split].optional:
                assert len(ours[split]) == 0
            else:
                columns = list(BENCHMARKS[name].columns)
                assert list(ours[split]) == list(theirs[split].select_columns(columns))
                assert len(ours[split]) > 0

    def test_of_mbpp_are_split_by_task_id(self, local: Path) -> None:
        splits = benchmark_documents("mbpp")
        assert splits["test"]["task_id"][:] == [11, 12, 510]
        assert splits["fewshot"]["task_id"][:] == [2, 3, 4]

    @pytest.mark.parametrize(
        ("file", "other"),
        [("HumanEval.jsonl.gz", "HumanEval.jsonl"), ("mbpp.jsonl", "mbpp.jsonl.gz")],
    )
    def test_may_be_compressed_or_not(self, file: str, other: str, local: Path) -> None:
        name = file.partition(".")[0].lower()
        before = {split: list(rows) for split, rows in benchmark_documents(name).items()}
        write_rows(local / other, FILES[file])
        with pytest.raises(EvalError, match=r"holds both .*\. Remove one of them"):
            benchmark_documents(name)
        (local / file).unlink()
        assert {split: list(rows) for split, rows in benchmark_documents(name).items()} == before

    def test_of_training_data_are_used_where_there_are_any(self, local: Path) -> None:
        write_rows(local / "ARC-Challenge-Train.jsonl", ARC[:1])
        assert benchmark_documents("arc_challenge")["train"]["id"][:] == ["Q_0"]

    def test_may_have_more_columns_and_empty_lines(self, local: Path) -> None:
        path = local / "gsm8k_test.jsonl"
        path.write_text("\n" + json.dumps({**GSM8K[0], "source": "x"}) + "\n\n", encoding="utf-8")
        assert list(benchmark_documents("gsm8k")["test"]) == [GSM8K[0]]

    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_missing_ones_are_not_taken_from_the_hub(
        self, name: str, local: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requested = use_hub(monkeypatch, hub_copies())
        monkeypatch.setenv(DATA_VARIABLE, str(local))
        files = {split.file for split in BENCHMARKS[name].splits.values() if not split.optional}
        for file in files:
            moved = next(path for path in local.iterdir() if path.name.startswith(file))
            moved.rename(local / "away")
            with pytest.raises(EvalError) as caught:
                benchmark_documents(name)
            for part in (
                str(local),
                file,
                DATA_VARIABLE,
                "https://",
                "to take it from the Hugging Face hub",
            ):
                assert part in str(caught.value)
            (local / "away").rename(moved)
        assert requested == []
        benchmark_documents(name)

    def test_folder_has_to_exist(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "no"))
        with pytest.raises(EvalError, match=r"SVSK_DATA is '.*no', which is not a folder"):
            benchmark_documents("gsm8k")
        monkeypatch.setenv(DATA_VARIABLE, "")
        assert local_folder() is None


def broken(rows: Rows, index: int, **changes: Any) -> Rows:
    """A copy with one row changed; a value of ... removes the key."""
    copy = [dict(row) for row in rows]
    copy[index].update(changes)
    copy[index] = {key: value for key, value in copy[index].items() if value is not ...}
    return copy


FAULTS: list[tuple[str, str, Rows, str]] = [
    ("humaneval", "HumanEval.jsonl.gz", broken(HUMANEVAL, 1, test=...), "row 2: test is 'None'"),
    ("mbpp", "mbpp.jsonl", broken(MBPP, 5, text=...), "row 6: text is 'None', expected str"),
    ("mbpp", "mbpp.jsonl", MBPP[5:], "0 row.* 'prompt' .* at least 3"),
    ("mbpp", "mbpp.jsonl", MBPP[:5], "0 row.* 'test' .* at least 1"),
    ("gsm8k", "gsm8k_test.jsonl", [], "cannot read rows of JSON"),
    ("gsm8k", "gsm8k_test.jsonl", [{"text": "x"}], "row 1: question is 'None', expected str"),
    (
        "gsm8k",
        "gsm8k_train_2000.jsonl",
        GSM8K[:4],
        "has 4 row.s. of the split that is 'train' .* at least 5",
    ),
    ("arc_challenge", "ARC-Challenge-Test.jsonl", broken(ARC, 1, answerKey="B"), "row 2: .*'B'"),
    ("arc_challenge", "ARC-Challenge-Test.jsonl", broken(ARC, 0, question="What?"), "row 1: "),
    ("hellaswag", "hellaswag_val.jsonl", broken(HELLASWAG, 1, label=...), "row 2: .*label is None"),
    ("hellaswag", "hellaswag_val.jsonl", broken(HELLASWAG, 1, endings="a"), "row 2: endings"),
    ("ifeval", "ifeval.jsonl", broken(IFEVAL, 0, kwargs=[{}]), "row 1: .*2 instructions with 1 "),
    ("ifeval", "ifeval.jsonl", broken(IFEVAL, 1, prompt=...), "row 2: prompt is 'None'"),
]


class TestDamagedFiles:
    @pytest.mark.parametrize(("name", "file", "rows", "message"), FAULTS)
    def test_rows(self, name: str, file: str, rows: Rows, message: str, local: Path) -> None:
        path = write_rows(local / file, rows)
        with pytest.raises(EvalError, match=message) as caught:
            benchmark_documents(name)
        assert str(path) in str(caught.value)
        assert "Take the file again" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda path: path.write_bytes(path.read_bytes()[:-30]),
            lambda path: path.write_bytes(b"plain text"),
            lambda path: path.write_bytes(gzip.compress(b"\xff\xfe")),
            lambda path: path.write_bytes(gzip.compress(b'{"task_id": \n')),
            lambda path: path.write_bytes(gzip.compress(b"[1]\n")),
        ],
        ids=["cut off", "not compressed", "not UTF-8", "no JSON", "no rows"],
    )
    def test_bytes(self, spoil: Callable[[Path], Any], local: Path) -> None:
        path = local / "HumanEval.jsonl.gz"
        spoil(path)
        with pytest.raises(EvalError, match=r"Take the file again from its authors") as caught:
            benchmark_documents("humaneval")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class TestHub:
    def test_is_requested_for_each_benchmark(self, monkeypatch: pytest.MonkeyPatch) -> None:
        requested = use_hub(monkeypatch, hub_copies())
        for name in BENCHMARKS:
            benchmark_documents(name)
        assert requested == [
            ("openai/openai_humaneval", None),
            ("google-research-datasets/mbpp", "full"),
            ("openai/gsm8k", "main"),
            ("allenai/ai2_arc", "ARC-Challenge"),
            ("Rowan/hellaswag", None),
            ("google/IFEval", None),
        ]

    def test_failure_tells_both_ways_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ConnectionError("no route\nmore")

        use_hub(monkeypatch, {})
        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(EvalError) as caught:
            benchmark_documents("gsm8k")
        message = str(caught.value)
        for part in (
            "openai/gsm8k (main)",
            "from the Hugging Face hub (ConnectionError: no route",
            "HF_HUB_OFFLINE",
            DATA_VARIABLE,
            "gsm8k_train_2000.jsonl, gsm8k_test.jsonl",
            "https://github.com/openai/grade-school-math",
        ):
            assert part in message

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            ({"test": Dataset.from_list(GSM8K)}, "has the splits test, expected 'train'"),
            (
                {"train": Dataset.from_list(GSM8K[:4]), "test": Dataset.from_list(GSM8K)},
                "has 4 row.*at least 5",
            ),
        ],
    )
    def test_other_data_than_expected(
        self, splits: dict[str, Dataset], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use_hub(monkeypatch, {"openai/gsm8k": DatasetDict(splits)})
        with pytest.raises(EvalError, match=message):
            benchmark_documents("gsm8k")


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [("humaneval", "test", 164), ("gsm8k", "test", 1319), ("ifeval", "test", 540)],
)
def test_the_real_files_are_whole(
    name: str, split: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published_file("HumanEval.jsonl.gz").parent
    published_file("gsm8k_test.jsonl")
    published_file("ifeval.jsonl")
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    rows = benchmark_documents(name)[split]
    assert len(rows) == count
    if name == "gsm8k":
        assert all(re.search(r"#### -?[\d,.]+$", row["answer"]) for row in rows)
