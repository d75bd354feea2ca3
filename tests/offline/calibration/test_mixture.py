# SPDX-License-Identifier: Apache-2.0
"""Several sources with their shares, the built-in texts, and where samples begin."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.calibration.arithmetic import word_problem
from svsk_offline.calibration.built_in import built_in_documents
from svsk_offline.calibration.conversations import parse_conversation
from svsk_offline.calibration.rows import RowReader
from svsk_offline.calibration.text import pack_rows
from svsk_offline.calibration_entries import (
    BUILT_IN,
    DEFAULT_PARTS,
    calibration_entries,
    sample_counts,
)
from svsk_offline.storage.dense_model import ModelSource
from tests.support.tiny_models import BOS

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    """The tiny tokenizer, to change."""
    return ModelSource(tiny_llama).tokenizer


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.txt and b.txt, each of one letter, from which relative names are taken."""
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(f"{letter} " * 4000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("entries", "shares"),
    [
        ("a.txt", {"a.txt": 1}),
        (["a.txt", "b.txt"], {"a.txt": 0.5, "b.txt": 0.5}),
        (["a.txt:3", "b.txt:1"], {"a.txt": 0.75, "b.txt": 0.25}),
        (["a.txt:.5", "b.txt:1e1", "a.txt:2."], {"a.txt": 0.2, "b.txt": 0.8}),
        (["default:1", "a.txt:3"], {"default": 0.25, "a.txt": 0.75}),
        ("org/name:part:train", {"org/name:part:train": 1}),
        (["org/name:part:train:2", "python:2"], {"org/name:part:train": 0.5, "python": 0.5}),
        ("wikimedia/wikipedia:20231101.en:train", {"wikimedia/wikipedia:20231101.en:train": 1}),
        ("odd:0.5", {"odd:0.5": 1}),  # there is such a file
        (["odd:0.5:3", "a.txt:1"], {"odd:0.5": 0.75, "a.txt": 0.25}),
    ],
)
def test_entries(texts: Path, entries: str | list[str], shares: dict[str, float]) -> None:
    (texts / "odd:0.5").write_text("text")
    found = {entry.name: entry.share for entry in calibration_entries(entries)}
    assert found == pytest.approx(shares)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "names no text"),
        (["a.txt", " "], "an entry is empty"),
        (["a.txt:0"], "a.txt:0: weight 0, expected a number above 0"),
        (["a.txt:-1"], "a.txt:-1: weight -1, expected a number above 0"),
        (["a.txt:1e999"], "weight 1e999, expected a number above 0"),
        (["a.txt:half"], "a.txt:half: expected a weight above 0 after a.txt:, got 'half'"),
        (["chat:x"], "chat:x: expected a weight above 0 after chat:, got 'x'"),
        (["a.txt:1", "b.txt"], "b.txt: has no weight, others have one"),
        (["a.txt:1", "missing.txt:2"], "missing.txt: no such file"),
    ],
)
@pytest.mark.usefixtures("texts")
def test_entries_that_cannot_be(entries: list[str], message: str) -> None:
    with pytest.raises(SvskError) as caught:
        calibration_entries(entries)
    assert message in str(caught.value)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 300), st.integers(0, 1)
)
def test_counts_are_in_proportion(weights: list[float], samples: int, least: int) -> None:
    samples = max(samples, least * len(weights))
    shares = [weight / sum(weights) for weight in weights]
    counts = sample_counts(shares, samples, least)
    assert sum(counts) == samples
    assert min(counts) >= least
    if not least:
        assert all(
            abs(count - share * samples) < 1 for count, share in zip(counts, shares, strict=True)
        )


@pytest.mark.usefixtures("texts")
def test_samples_of_several_files(tokenizer: Any) -> None:
    drawn = load_calibration(["a.txt:3", "b.txt:1"], tokenizer, 10, 16, 0)
    letters = ["".join(sorted(set(tokenizer.decode(row)) - {" "})) for row in drawn.tokens]
    assert letters == ["a"] * 8 + ["b"] * 2
    assert drawn.source == "a.txt:0.75, b.txt:0.25"
    described = drawn.describe()
    assert [part["source"] for part in described["parts"]] == ["a.txt", "b.txt"]
    assert [part["samples"] for part in described["parts"]] == [8, 2]
    assert [part["weight"] for part in described["parts"]] == [0.75, 0.25]
    assert len({part["fingerprint"] for part in described["parts"]} | {drawn.fingerprint}) == 3
    again = load_calibration(["a.txt:3", "b.txt:1"], tokenizer, 10, 16, 0)
    assert again.describe() == described
    # One sample at least of what has a weight.
    little = load_calibration(["a.txt:1000", "b.txt:1"], tokenizer, 4, 16, 0)
    assert [part.samples for part in little.parts] == [3, 1]
    with pytest.raises(
        SvskError, match=r"names 2 texts, but 1 samples are asked for: expected 2 or more"
    ):
        load_calibration(["a.txt", "b.txt"], tokenizer, 1, 16, 0)


@pytest.mark.usefixtures("texts")
def test_a_text_that_is_too_short_among_others(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("c " * 40)
    with pytest.raises(SvskError, match=r"short\.txt has 80 tokens, 5 pieces of 16; 10 samples"):
        load_calibration(["a.txt", "short.txt"], tokenizer, 20, 16, 0)
    drawn = load_calibration(["a.txt", "short.txt"], tokenizer, 20, 16, 0, fewer=True)
    assert [part.samples for part in drawn.parts] == [10, 5]
    (tmp_path / "none.txt").write_text("c")
    with pytest.raises(SvskError, match=r"none\.txt has 1 tokens, 0 pieces"):
        load_calibration(["a.txt", "none.txt"], tokenizer, 20, 16, 0, fewer=True)


@pytest.mark.usefixtures("texts")
def test_a_chat_template_for_one_of_several_sources(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": f"{i}."}) + "\n" for i in range(200))
    )
    drawn = load_calibration([str(rows), "a.txt"], tokenizer, 2, 64, 0, chat_template=True)
    assert "<|im_start|>user\n" in tokenizer.decode(drawn.tokens[0])
    for sources in (["a.txt", "b.txt"], ["a.txt", "default"]):
        with pytest.raises(SvskError, match=r"--chat-template has no effect: .*a\.txt has plain"):
            load_calibration(sources, tokenizer, 8, 16, 0, chat_template=True)


def test_the_default_mixture(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    drawn = load_calibration("default", tokenizer, 40, 256, 0)
    assert drawn.source == "default"
    assert {part.source: part.samples for part in drawn.parts} == {
        name: 40 * share for name, share in DEFAULT_PARTS.items()
    }
    assert len(torch.unique(drawn.tokens, dim=0)) == 40
    text = tokenizer.decode(drawn.tokens.flatten())
    assert "def " in text
    assert "<|im_start|>user\n" in text
    ends, starts = text.count("<|im_end|>"), text.count("<|im_start|>assistant")
    assert ends > starts > 3  # a user turn ends before each answer, and some answers end too
    assert load_calibration("default", tokenizer, 40, 256, 0).fingerprint == drawn.fingerprint
    assert load_calibration("default", tokenizer, 40, 256, 1).fingerprint != drawn.fingerprint
    # Fewer samples than it has parts go to the largest parts.
    assert [part.source for part in load_calibration("default", tokenizer, 2, 32, 0).parts] == [
        "prose",
        "chat",
    ]


def test_the_default_mixture_beside_a_file(tokenizer: Any, texts: Path) -> None:
    drawn = load_calibration(["default:1", "a.txt:1"], tokenizer, 40, 32, 0)
    assert [part.source for part in drawn.parts] == [*DEFAULT_PARTS, "a.txt"]
    assert [part.samples for part in drawn.parts] == [7, 4, 6, 3, 20]
    assert sum(part.weight for part in drawn.parts) == pytest.approx(1)


def documents(tokenizer: Any, name: str, count: int, seed: int = 0) -> list[str]:
    made = built_in_documents(name, RowReader(tokenizer, False), seed)
    return [text for _, text in zip(range(count), made, strict=False)]


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in ("default", "python")])
def test_built_in_texts_have_variety(tokenizer: Any, name: str) -> None:
    found = documents(tokenizer, name, 200)
    assert len(set(found)) > 150
    assert sum(map(len, found)) > 50_000
    assert documents(tokenizer, name, 200) == found
    assert documents(tokenizer, name, 200, seed=1) != found
    assert all(text.endswith("\n\n") for text in found)
    assert max(map(len, found)) < 30_000  # none fills most samples alone


def test_code_is_not_what_the_demo_scores_on(tokenizer: Any) -> None:
    text = "".join(documents(tokenizer, "code", 10_000))
    for own in ("class OptionParser", "class Mailbox", "class IMAP4", "class FTP", "class Pdb"):
        assert f"{own}(" not in text
        assert f"{own}:" not in text
    assert "SELECT" in text
    assert "#include <stdint.h>" in text


def test_conversations_are_of_one_language_and_differ(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    found = documents(tokenizer, "chat", 400)
    assert len(set(found)) > 380
    turns = Counter(
        turn for text in found for turn in text.split("<|im_end|>\n") if "im_start|>user" in turn
    )
    assert len(turns) > 300
    assert any("Wärmepumpe" in text for text in found)
    for text in found:
        assert text.endswith("<|im_end|>\n")
        assert not ("Wärmepumpe?" in text and "Why do leaves" in text)


def plain(messages: Sequence[str]) -> str:
    return "\n\n".join(messages) + "\n\n\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, plain(["be brief", "hello", "hi"])),
        ("{{ raise_exception('no') }}", plain(["be brief", "hello", "hi"])),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + CHATML,
            "<|im_start|>user\nbe brief\n\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n",
        ),
        (
            CHATML,
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
            "<|im_start|>assistant\nhi<|im_end|>\n",
        ),
        # A template that leaves the system's message out without a word.
        (
            CHATML.replace("in messages", "in messages if m.role != 'system'"),
            "<|im_start|>user\nbe brief\n\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n",
        ),
    ],
)
def test_own_conversations_suit_every_tokenizer(
    tokenizer: Any, template: str | None, expected: str
) -> None:
    tokenizer.chat_template = template
    messages = [
        {"role": role, "content": content}
        for role, content in (("system", "be brief"), ("user", "hello"), ("assistant", "hi"))
    ]
    assert RowReader(tokenizer, False).conversation(messages, "here") == expected


def test_conversations_that_are_none() -> None:
    for text in ("An answer first.", "> A question without an answer", "> a\nb\n> c"):
        with pytest.raises(ValueError, match="expected turns of user and assistant"):
            parse_conversation(text)
    assert [turn["content"] for turn in parse_conversation("> a\n>\n> b\nc\n\nd\n\n")] == [
        "a\n\nb",
        "c\n\nd",
    ]


def test_worked_problems_are_right() -> None:
    """Every equation of plain numbers in the answers holds."""
    rng = random.Random(0)
    checked = 0
    for _ in range(600):
        answer = word_problem(rng).answer.replace("$", "").replace("\u00d7", "*").replace("²", "")
        for line in answer.replace("\n", ". ").split(". "):
            left, equals, right = line.rstrip(".").partition(" = ")
            terms = left.rpartition(" is ")[2] if " is " in left else left
            right = right.split(" = ")[0].split(",")[0].split(" ")[0]
            allowed = set("0123456789.+-*/() ")
            if equals and set(terms) <= allowed and terms.strip() and set(right) <= allowed:
                assert eval(terms) == pytest.approx(float(Fraction(right))), (line, answer)
                checked += 1
    assert checked > 400


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2], [3, 4, 5], [6], [7, 8, 9]], [[1, 2, 3], [6, 7, 8]]),  # 4, 5 and 9 are cut off
        ([[1], [2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
        ([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]], [[1, 2, 3], [4, 5, 6], [8, 9, 10]]),
        ([[0, 1, 2, 3], [0, 4, 5], [0, 6, 7, 8]], [[1, 2, 3], [4, 5, 0]]),  # 0 is the prefix
        ([[1], []], []),
    ],
)
def test_packing(rows: list[list[int]], expected: list[list[int]]) -> None:
    assert list(pack_rows(rows, [0], 3)) == expected


def rows_of(kind: str, count: int) -> bytes:
    """Rows of one to ten marks behind an X, all shorter than a sample."""
    import gzip

    rng = random.Random(0)
    rows = [{"text": "X" + f"{i:05d}" * rng.randint(1, 10)} for i in range(count)]
    if kind == "list":
        return json.dumps(rows).encode()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(lines) if kind == "packed" else lines


@pytest.mark.parametrize("kind", ["lines", "list", "packed"])
@pytest.mark.parametrize("count", [100, 6000])
def test_samples_begin_where_rows_begin(
    tokenizer: Any, tmp_path: Path, kind: str, count: int
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(rows_of(kind, count))
    for seed in range(3):
        drawn = load_calibration(str(path), tokenizer, 12, 64, seed)
        assert [tokenizer.decode(row)[0] for row in drawn.tokens] == ["X"] * 12
        assert len(torch.unique(drawn.tokens, dim=0)) == 12


def test_rows_that_are_too_few_are_cut_as_one_stream(
    tokenizer: Any, tmp_path: Path, tiny_llama: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "X" + "o" * 20}) + "\n" for _ in range(8)))
    tokens = sum(
        len(tokenizer("X" + "o" * 20 + "\n\n", add_special_tokens=False)["input_ids"])
        for _ in range(8)
    )
    most = tokens // 16
    drawn = load_calibration(str(path), tokenizer, most, 16, 0)
    assert drawn.tokens.shape == (most, 16)
    with pytest.raises(SvskError, match=f"has {tokens} tokens, {most} pieces of 16"):
        load_calibration(str(path), tokenizer, most + 1, 16, 0)


@pytest.mark.parametrize("count", [40, 20_000])
def test_a_template_that_renders_bos_does_not_double_it(
    tokenizer: Any, tmp_path: Path, count: int
) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.chat_template = "<bos>" + CHATML
    path = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    path.write_text((json.dumps({"messages": said}) + "\n") * count)
    tokens = load_calibration(str(path), tokenizer, 4, 96, 0).tokens
    assert tokens[:, 0].tolist() == [BOS] * 4
    assert not (tokens[:, 1] == BOS).any()
    assert (tokens[:, 2:] == BOS).any()  # of the conversations that follow


def test_a_run_notes_its_mixture(
    tiny_llama: Path, tmp_path: Path, texts: Path, command: Callable[..., Any]
) -> None:
    from svsk_vllm.format import Checkpoint

    options = ["--recipe", "published", "--rank", 0, "--samples", 6, "--seq-len", 32]
    mixture = ["--calibration", "a.txt:2", "--calibration", "b.txt:1"]
    result = command("quantize", tiny_llama, "out", *options, *mixture)
    assert result.exit_code == 0, result.output
    assert "Calibration: a.txt:2, b.txt:1, 6 samples of 32 tokens = 192 tokens" in result.output
    producer = Checkpoint(tmp_path / "out").config.producer
    assert producer["calibration"]["source"] == "a.txt:0.666667, b.txt:0.333333"
    assert [part["samples"] for part in producer["calibration"]["parts"]] == [4, 2]


@pytest.fixture
def command() -> Callable[..., Any]:
    from typer.testing import CliRunner

    from svsk_eval.cli import app

    return lambda *arguments: CliRunner().invoke(app, [str(item) for item in arguments])
