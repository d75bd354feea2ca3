# SPDX-License-Identifier: Apache-2.0
"""Calibration text: every source, the draw of samples, and errors that name the row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svsk_offline.calibration import load_calibration
from svsk_offline.errors import SvskError
from svsk_offline.source import ModelSource


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    return ModelSource(tiny_llama).tokenizer


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return str(path)

    return write


def text_of(tokenizer: Any, source: str, samples: int = 1, seq_len: int = 16, **options: Any) -> str:
    return str(tokenizer.decode(load_calibration(source, tokenizer, samples, seq_len, 0, **options).tokens[0]))


def test_standard_library_has_prose_and_code(tokenizer: Any) -> None:
    calibration = load_calibration("python", tokenizer, 64, 512, 0)
    text = tokenizer.decode(calibration.tokens.flatten())
    assert calibration.tokens.shape == (64, 512)
    assert "def " in text
    assert "statement" in text


def test_samples_are_drawn_from_all_over_the_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"<{i:06d}>" for i in range(4000)))
    calibration = load_calibration(str(path), tokenizer, 10, 32, 0)
    places = [int(tokenizer.decode(row).split("<")[1][:6]) for row in calibration.tokens]
    assert places == sorted(places)
    for index, place in enumerate(places):
        assert 400 * index - 10 <= place <= 400 * (index + 1) + 10
    other = load_calibration(str(path), tokenizer, 10, 32, 1)
    assert calibration.fingerprint != other.fingerprint
    assert calibration.fingerprint == load_calibration(str(path), tokenizer, 10, 32, 0).fingerprint
    assert calibration.describe()["source"] == "text.txt"  # no folder of this machine in the checkpoint


def test_rows(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    assert text_of(tokenizer, jsonl({"text": "abcdefghijklmnopqrstuvwxyz"})).startswith("abcdef")
    row = {"question": "one plus one", "answer": "two, as everybody knows"}
    assert "one plus one\ntwo" in text_of(tokenizer, jsonl(row), seq_len=20)
    row = {"prompt": "one plus one", "completion": "two, as everybody knows"}
    assert "one plus one\ntwo" in text_of(tokenizer, jsonl(row), seq_len=20)


def test_messages_and_chat_template(tokenizer: Any, jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    messages = {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]}
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(SvskError, match=r"rows\.jsonl, line 1: holds messages, .* no chat template"):
        text_of(tokenizer, jsonl(messages))
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert "[user] hello there" in text_of(tokenizer, jsonl(messages), seq_len=20)
    row = {"question": "one plus one", "answer": "two"}
    assert "[user] one plus one" in text_of(tokenizer, jsonl(row), chat_template=True, seq_len=20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnot json\n', "line 2: not JSON"),
        ('{"text": "a"}\n[1]\n', "line 2: a list, expected an object"),
        ('{"label": 1, "body": "b"}\n', "line 1: has label, body; expected text, messages"),
    ],
)
def test_bad_rows_are_named(tokenizer: Any, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(SvskError, match=message):
        load_calibration(str(path), tokenizer, 4, 64, 0)


def test_too_little_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abcdef" * 10)
    with pytest.raises(SvskError, match=r"tokens, \d+ pieces of 16; 50 samples are asked for.*lower --samples"):
        load_calibration(str(path), tokenizer, 50, 16, 0)


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "missing.jsonl"])
def test_missing_files(tokenizer: Any, source: str) -> None:
    with pytest.raises(SvskError, match="no such file"):
        load_calibration(source, tokenizer, 1, 16, 0)


def test_text_that_is_not_utf8(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xff\xfe caf\xe9" * 100)
    with pytest.raises(SvskError, match="not UTF-8"):
        load_calibration(str(path), tokenizer, 1, 16, 0)


def test_dataset_by_name(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"text": "the rows of a dataset, one after the other"}] * 50

    monkeypatch.setattr(datasets, "load_dataset", load)
    calibration = load_calibration("org/name:part:validation", tokenizer, 4, 32, 0)
    assert asked == [("org/name", "part", "validation", True)]
    assert calibration.tokens.shape == torch.Size((4, 32))

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SvskError, match="neither a file nor a dataset that can be loaded"):
        load_calibration("org/name", tokenizer, 4, 32, 0)
