# SPDX-License-Identifier: Apache-2.0
"""Calibration text: every source, the draw of samples, and errors that name the row."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizer

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.calibration.text import bos_prefix
from svsk_offline.storage.dense_model import ModelSource
from tests.support.tiny_models import BOS, EOS, PAD


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


def text_of(
    tokenizer: Any, source: str, samples: int = 1, seq_len: int = 16, **options: Any
) -> str:
    return str(
        tokenizer.decode(
            load_calibration(source, tokenizer, samples, seq_len, 0, **options).tokens[0]
        )
    )


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
    # No folder of this machine in the checkpoint.
    assert calibration.describe()["source"] == "text.txt"


def with_template(folder: Path, template: str) -> Any:
    """The tiny tokenizer, putting special tokens around a text as Llama 3's and others do."""
    tokenizer = ModelSource(folder).tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<pad>", PAD), ("<eos>", EOS), ("<bos>", BOS)]
    )
    return tokenizer


class SlowTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """Characters, in pure Python; BOS in front and EOS behind."""

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(128)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def build_inputs_with_special_tokens(
        self, first: list[int], second: list[int] | None = None
    ) -> list[int]:
        return [1, *first, 2]


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("$A", []),
        ("$A <eos>", []),
        ("<bos> $A", [BOS]),
        ("<bos> $A <eos>", [BOS]),
        ("<bos> $A <bos>", [BOS]),
        ("<pad> <bos> $A", [PAD, BOS]),
    ],
)
def test_the_prefix_of_fast_tokenizers(tiny_llama: Path, template: str, prefix: list[int]) -> None:
    tokenizer = with_template(tiny_llama, template)
    assert bos_prefix(tokenizer) == prefix
    assert tokenizer("xy")["input_ids"][: len(prefix)] == prefix


def test_the_prefix_of_a_slow_tokenizer(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer()
    assert not tokenizer.is_fast
    assert tokenizer("ab")["input_ids"] == [1, 97, 98, 2]
    assert bos_prefix(tokenizer) == [1]
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmno")
    tokens = load_calibration(str(path), tokenizer, 3, 6, 0).tokens
    assert ["".join(map(chr, row)) for row in tokens] == ["\x01abcde", "\x01fghij", "\x01klmno"]


def test_a_prefix_that_cannot_be_told_is_an_error() -> None:
    def encode(_: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, 8, 9] if add_special_tokens else [7, 8]}

    with pytest.raises(SvskError, match=r"\[7, 8\] without special tokens and as \[1, 8, 9\]"):
        bos_prefix(encode)


@pytest.mark.parametrize("prefix", [[BOS], [PAD, BOS]])
def test_samples_start_with_bos_and_hold_consecutive_text(
    tiny_llama: Path, tmp_path: Path, prefix: list[int]
) -> None:
    tokenizer = with_template(
        tiny_llama, " ".join({PAD: "<pad>", BOS: "<bos>"}[i] for i in prefix) + " $A <eos>"
    )
    path = tmp_path / "text.txt"
    path.write_text("".join(f"<{i:06d}>" for i in range(100)))
    stream = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    width = 32 - len(prefix)
    pieces = len(stream) // width
    # As many as there are: all are drawn.
    calibration = load_calibration(str(path), tokenizer, pieces, 32, 0)
    assert calibration.tokens.shape == (pieces, 32)
    assert calibration.tokens.dtype == torch.int64
    assert calibration.tokens[:, : len(prefix)].tolist() == [prefix] * pieces
    assert calibration.tokens[:, len(prefix) :].flatten().tolist() == stream[: pieces * width]
    assert calibration.describe()["bos"] is True
    assert (
        calibration.fingerprint == hashlib.sha256(calibration.tokens.numpy().tobytes()).hexdigest()
    )
    with pytest.raises(SvskError, match=f"pieces of {width} after BOS; {pieces + 1} samples"):
        load_calibration(str(path), tokenizer, pieces + 1, 32, 0)
    with pytest.raises(
        SvskError, match=rf"puts {len(prefix)} token\(s\) in front .* {len(prefix) + 1} or more"
    ):
        load_calibration(str(path), tokenizer, 1, len(prefix), 0)


@pytest.mark.parametrize("template", [None, "$A <eos>"])
def test_without_bos_samples_are_what_they_always_were(
    tiny_llama: Path, tmp_path: Path, template: str | None
) -> None:
    tokenizer = (
        with_template(tiny_llama, template) if template else ModelSource(tiny_llama).tokenizer
    )
    path = tmp_path / "text.txt"
    path.write_text("".join(f"<{i:06d}>" for i in range(4000)))
    calibration = load_calibration(str(path), tokenizer, 10, 32, 0)
    # Noted before there was a prefix: checkpoints that exist name it.
    before = "307ad9829aa0ea86229a61354b9e32b5b15d9bfe28bb8b45b0877855e05d1bce"
    assert calibration.describe() == {
        "source": "text.txt",
        "samples": 10,
        "seq_len": 32,
        "fingerprint": before,
    }


def test_rows(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    assert text_of(tokenizer, jsonl({"text": "abcdefghijklmnopqrstuvwxyz"})).startswith("abcdef")
    row = {"question": "one plus one", "answer": "two, as everybody knows"}
    assert "one plus one\ntwo" in text_of(tokenizer, jsonl(row), seq_len=20)
    row = {"prompt": "one plus one", "completion": "two, as everybody knows"}
    assert "one plus one\ntwo" in text_of(tokenizer, jsonl(row), seq_len=20)


def test_messages_and_chat_template(
    tokenizer: Any, jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = {
        "messages": [
            {"role": "user", "content": "hello there"},
            {"role": "assistant", "content": "hi"},
        ]
    }
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(
        SvskError, match=r"rows\.jsonl, line 1: holds messages, .* no chat template"
    ):
        text_of(tokenizer, jsonl(messages))
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert "[user] hello there" in text_of(tokenizer, jsonl(messages), seq_len=20)
    row = {"question": "one plus one", "answer": "two"}
    assert "[user] one plus one" in text_of(tokenizer, jsonl(row), chat_template=True, seq_len=20)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "system", "content": "be brief"}],
            "the model's chat template rejects its messages .*no system role here",
        ),
        ([{"role": "user"}], "rejects its messages .*no attribute 'content'"),
        ([{"role": "user", "content": None}], "rejects its messages .*NoneType"),
        ([], "rejects its messages .*empty conversation"),
        (["hello"], "must be objects with role and content"),
        ([[{"role": "user", "content": "a"}]], "must be objects with role and content"),
    ],
)
def test_messages_that_the_chat_template_rejects_are_named(
    tokenizer: Any,
    jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    messages: list[Any],
    message: str,
) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{%"
        " endif %}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(SvskError, match=rf"rows\.jsonl, line 2: .*{message}"):
        text_of(tokenizer, jsonl({"text": "fine"}, {"messages": messages}), seq_len=64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\nnot json\n',
            r"line 2: not JSON \(.*\)\. Expected a JSON object on each line",
        ),
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
    with pytest.raises(
        SvskError, match=r"tokens, \d+ pieces of 16; 50 samples are asked for.*lower --samples"
    ):
        load_calibration(str(path), tokenizer, 50, 16, 0)


def test_too_little_text_in_a_large_file(tokenizer: Any, tmp_path: Path) -> None:
    """Which is sampled at places, without reading all of it: other keys fill the rows."""
    path = tmp_path / "mostly-labels.jsonl"
    row = json.dumps({"text": "a", "label": "x" * 200_000}) + "\n"
    path.write_text(row * 8)
    with pytest.raises(
        SvskError,
        match=r"mostly-labels\.jsonl: a part of it holds fewer than 64 tokens \(is it blank",
    ):
        load_calibration(str(path), tokenizer, 2, 64, 0)


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "missing.jsonl"])
def test_missing_files(tokenizer: Any, source: str) -> None:
    with pytest.raises(SvskError, match=r"Calibration text .*: no such file\."):
        load_calibration(source, tokenizer, 1, 16, 0)


def test_text_that_is_not_utf8(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 100)
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
