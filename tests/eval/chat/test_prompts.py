# SPDX-License-Identifier: Apache-2.0
"""Prompts of every kind of row, and files and rows that hold none."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from svsk_eval.chat.prompts import read_prompts, shared_prompts
from svsk_eval.errors import EvalError
from svsk_eval.text.models import load_tokenizer
from svsk_kernels.errors import SvskError
from tests.support.format_builders import edit_json
from tests.support.tiny_models import write_dense

USER = {"role": "user", "content": "one plus one"}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "one plus one", "answer": "2"}, [USER]),
        ({"prompt": "one plus one"}, [USER]),
        ({"text": "one plus one", "code": "1 + 1"}, [USER]),
        ({"instruction": "one plus one", "input": "", "output": "2"}, [USER]),
        (
            {"instruction": "add", "input": "1, 1", "output": "2"},
            [{"role": "user", "content": "add\n1, 1"}],
        ),
        ({"messages": [USER, {"role": "assistant", "content": "2"}]}, [USER]),
        ({"messages": [USER], "text": "not this", "prompt": None}, [USER]),
        (
            {"conversations": [{"from": "human", "value": "one plus one"}, {"from": "gpt"}]},
            [USER],
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "2"}, USER]},
            [USER, {"role": "assistant", "content": "2"}, USER],
        ),
    ],
)
def test_every_kind_of_row(tmp_path: Path, row: Any, messages: list[dict[str, str]]) -> None:
    (prompt,) = read_prompts(write(tmp_path, row), 1)
    assert [dict(message) for message in prompt.messages] == messages
    assert prompt.where == f"--chat {tmp_path / 'rows.jsonl'}, line 1"


def test_the_first_rows_are_taken_whatever_stands_behind_them(tmp_path: Path) -> None:
    rows = [{"question": f"question {number}"} for number in range(5)]
    path = write(tmp_path, *rows, "no prompt at all")
    prompts = read_prompts(path, 3)
    assert [prompt.messages[0]["content"] for prompt in prompts] == [
        "question 0",
        "question 1",
        "question 2",
    ]
    assert len({prompt.fingerprint for prompt in prompts}) == 3
    listed = tmp_path / "rows.json.gz"
    listed.write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert [prompt.fingerprint for prompt in read_prompts(listed, 3)] == [
        prompt.fingerprint for prompt in prompts
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"line 2: a list, expected an object"),
        ({"answer": "2", "n": 1}, r"line 2: has answer, n, and none of messages, .* text, which"),
        ({}, r"line 2: has no key, and none of"),
        ({"question": 7}, r"line 2: question is a int, expected a string"),
        ({"instruction": "add", "input": [1]}, r"line 2: input is a list, expected a string"),
        ({"messages": "hello"}, r"line 2: messages is a str, expected a list"),
        ({"messages": ["hello"]}, r"line 2: messages must be objects"),
        ({"messages": []}, r"line 2: no user's message is there"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"line 2: no user's message"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, r"line 2: a message is from 'cat'"),
    ],
)
def test_rows_without_a_prompt_are_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, {"question": "fine"}, row)
    with pytest.raises(SvskError, match=rf"^--chat .*rows\.jsonl, {message}"):
        read_prompts(path, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty"),
        (b"a plain text\n", r"holds plain text, expected JSON: an object with messages"),
        (b"PAR1 and so on PAR1", r"holds parquet, expected JSON"),
        (b'{"question": "a"}\n', r"holds 1 prompts, fewer than the 2 asked for. Give --prompts 1"),
        (b'{"question": "a"}\nnot json\n', r"line 2: not JSON"),
        (b'{"question": "\xff"}\n{}\n', r"not UTF-8: byte 14 is 0xff"),
    ],
)
def test_files_without_prompts_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    with pytest.raises(SvskError, match=rf"rows\.txt.*{message}") as caught:
        read_prompts(path, 2)
    assert "Calibration" not in str(caught.value)
    with pytest.raises(SvskError, match=r"--chat .*absent: no such file"):
        read_prompts(tmp_path / "absent", 2)


def test_the_template_that_both_have_makes_the_prompt(models: Path, prompts: Path) -> None:
    asked = read_prompts(prompts, 2)
    tokenizer, (first, _) = shared_prompts(asked, models / "svsk", models / "dense")
    assert tokenizer.decode(first) == "<bos>user: what is a tin<eos>assistant: "


def test_models_that_are_asked_differently_are_refused(
    models: Path, prompts: Path, tmp_path: Path
) -> None:
    asked = read_prompts(prompts, 2)
    plain = write_dense(tmp_path / "plain")
    with pytest.raises(EvalError, match=r"plain: its tokenizer has no chat template"):
        shared_prompts(asked, models / "dense", plain)
    with pytest.raises(EvalError, match=r"plain: its tokenizer has no chat template"):
        shared_prompts(asked, plain, models / "dense")
    tokenizer = load_tokenizer(plain)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(plain)
    with pytest.raises(EvalError, match=r"chat templates of .*plain and of the reference .*dense"):
        shared_prompts(asked, plain, models / "dense")
    # The same tokens of these prompts, and other names for tokens that they do not have.
    tokenizer.chat_template = load_tokenizer(models / "dense").chat_template
    tokenizer.save_pretrained(plain)
    vocabulary = tokenizer.get_vocab()
    swapped = {"~": vocabulary["^"], "^": vocabulary["~"]}
    edit_json(plain / "tokenizer.json", lambda saved: saved["model"]["vocab"].update(swapped))
    with pytest.raises(EvalError, match=r"tokenizers or chat templates .* differ"):
        shared_prompts(asked, plain, models / "dense")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            {"role": "system", "content": "a"},
            "the chat template of .*model rejects its messages .no system here",
        ),
        ({"role": "user", "content": None}, "rejects its messages .*NoneType"),
        (
            {"role": "user", "content": "\ud800"},
            r"holds \\ud800, half of a pair that is no character. Mend",
        ),
    ],
)
def test_messages_that_a_template_rejects_are_named(
    tmp_path: Path, message: dict[str, Any], error: str
) -> None:
    folder = write_dense(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    asked = read_prompts(write(tmp_path, {"messages": [message, USER]}), 1)
    with pytest.raises(EvalError, match=rf"rows\.jsonl, line 1: .*{error}"):
        shared_prompts(asked, folder, folder)
