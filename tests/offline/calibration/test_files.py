# SPDX-License-Identifier: Apache-2.0
"""What a file of calibration text is, told by its content.

Encodings; and large files, of which little is read.
"""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svsk_kernels.errors import SvskError
from svsk_offline.calibration import load_calibration
from svsk_offline.calibration.files import open_text
from svsk_offline.calibration.limits import check_length, check_token_ids, longest_sequence
from svsk_offline.storage.dense_model import ModelSource

SENTENCES = [f"Sentence number {i} about caf\u00e9s, r\u00edos and \u732b." for i in range(80)]
ROWS = [{"text": sentence} for sentence in SENTENCES]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    return ModelSource(tiny_llama).tokenizer


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Callable[..., str]:
    """Writes a file and gives the text of all samples drawn of it."""

    def loaded(
        name: str, content: bytes, samples: int = 4, seq_len: int = 64, **options: Any
    ) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        found = load_calibration(str(path), tokenizer, samples, seq_len, 0, **options)
        # Half a letter at an end.
        return "".join(tokenizer.decode(row).strip("\ufffd") for row in found.tokens)

    return loaded


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.ndjson", LINES.encode()),
        ("a.json", LINES.encode()),
        ("a.txt", LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("windows.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("little.jsonl", LINES.encode("utf-16")),
        ("big.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
        ("blank.jsonl", LINES.replace("\n", "\n\n  \n").encode()),
        ("list.json", json.dumps(ROWS).encode()),
        ("list.txt", json.dumps(ROWS, indent=2).encode()),
        ("List.JSON", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode()),
        ("objects.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("packed.jsonl.gz", gzip.compress(LINES.encode())),
        ("packed.json", gzip.compress(json.dumps(ROWS).encode())),
        ("text.txt", "\n\n".join(SENTENCES).encode()),
        ("TEXT", "\n\n".join(SENTENCES).encode("utf-16")),
        ("text.gz", gzip.compress("\n\n".join(SENTENCES).encode())),
    ],
)
def test_a_file_is_what_it_holds(load: Callable[..., str], name: str, content: bytes) -> None:
    text = load(name, content)
    assert "Sentence number" in text
    assert "caf\u00e9s, r\u00edos and \u732b." in text
    assert not any(wrong in text for wrong in ("\ufffd", '"text"', "\\u", "\r", "\ufeff"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "[Chapter 1]\n" + "It was a bright cold day. " * 40),
        ("code.txt", "{ int main; }\n" * 60),
        ("numbers.txt", "[1, 2, 3]\n" * 60),
    ],
)
def test_brackets_alone_do_not_make_text_json(
    load: Callable[..., str], name: str, content: str
) -> None:
    assert load(name, content.encode())[:10] in content


def test_parquet(load: Callable[..., str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "made")
    content = (tmp_path / "made").read_bytes()
    for name in ("a.parquet", "A.PARQUET", "b.bin"):
        assert "caf\u00e9s, r\u00edos and \u732b." in load(name, content)
    with pytest.raises(SvskError, match=r"short\.parquet: ends with .* cut short"):
        load("short.parquet", content[:-20])
    with pytest.raises(SvskError, match=r"begins with .* a parquet file with b'PAR1'"):
        load("text.parquet", LINES.encode())
    with pytest.raises(SvskError, match=r"damaged\.parquet: cannot be read as parquet"):
        load("damaged.parquet", b"PAR1" + bytes(range(256)) * 4 + b"PAR1")
    rows = [{"text": None}, {"text": "a"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "null")
    with pytest.raises(SvskError, match=r"null\.parquet, row 1: text is null"):
        load("null.parquet", (tmp_path / "null").read_bytes())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "latin.txt",
            b"caf\xe9 " * 40,
            r"latin\.txt: not UTF-8: byte 3 is 0xe9 .*Expected UTF-8, or UTF-16 with",
        ),
        ("latin.jsonl", LINES.encode("latin-1", "ignore"), r"not UTF-8: byte 37 is 0xe9"),
        ("late.txt", b"a" * 70000 + b"\xff" + b"a" * 9, r"not UTF-8: byte 70000 is 0xff"),
        ("cut.txt", "caf\u00e9".encode()[:-1], r"byte 3 is 0xc3"),
        ("zero.txt", b"abc\0def", r"byte 3 is 0x00"),
        ("nomark.txt", "abc".encode("utf-16-le"), r"byte 1 is 0x00"),
        ("utf32.txt", "abc".encode("utf-32"), r"is UTF-32, expected UTF-8"),
        ("odd.txt", "abc".encode("utf-16") + b"\x00\xd8", r"not UTF-16: byte 8"),
        ("empty.txt", b"", r"is empty"),
        (
            "notgzip.gz",
            b"\x1f\x8b\x08\x00",
            r"begins like gzip, but cannot be unpacked|cannot be read",
        ),
        ("cut.gz", gzip.compress(LINES.encode())[:200], r"cannot be read after byte"),
        (
            "list.json",
            b'[{"text": "a"}, {"text": "b"}',
            r"line 1: not JSON \(expected a comma or the end of the list\)",
        ),
        ("list.json", b'[{"text": "a"},\n{"text" "b"}]', r"line 2: not JSON"),
        ("list.json", b'[{"text": "a"}] more', r"text after the end of the list"),
        ("list.json", b'[{"text": "a"},\n 3]', r"line 2 \(row 2\): a int, expected an object\."),
        ("list.json", b'[{"text": "a"},\n {"text": null}]', r"line 2 \(row 2\): text is null"),
        ("open.json", b'{"text": "a\n', r"line 1: not JSON"),
        ("deep.json", b"[" * 200_000, r"line 1: not JSON|expected an object"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', r"line 2: text is null. Drop the row"),
        (
            "number.jsonl",
            b'{"text": 3}\n{"text": "a"}\n',
            r"line 1: text is a int, expected a string",
        ),
        (
            "half.jsonl",
            b'{"text": "a"}\n{"text": "\\ud800"}\n',
            r"Calibration .*line 2: holds \\ud800, half of a pair",
        ),
        ("answer.jsonl", b'{"question": "a", "answer": null}\n{}\n', r"line 1: answer is null"),
        ("none.jsonl", b"{}\n{}\n", r"Calibration .*line 1: has no key; expected text, messages"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    load: Callable[..., str], name: str, content: bytes, message: str
) -> None:
    with pytest.raises(SvskError, match=message) as caught:
        load(name, content)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_looked_for_where_it_would_be(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(SvskError, match=f"^--prompts {path}: no such file in {tmp_path}[.]$"):
        open_text(path, "--prompts")


def test_rows_of_conversations(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = ModelSource(tiny_llama).tokenizer
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path = tmp_path / "rows.jsonl"

    def text(row: Any, chat_template: bool = False) -> str:
        path.write_text("\n".join([json.dumps(row)] * 20))
        found = load_calibration(str(path), tokenizer, 1, 200, 0, chat_template=chat_template)
        return str(tokenizer.decode(found.tokens[0]))

    said = "a long enough answer, this is"
    spoken = {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": said}]}
    assert f"<user>why?<assistant>{said}" in text(spoken)
    assert f"<user>why?<assistant>{said}" in text({"messages": spoken["conversations"]})
    with pytest.raises(
        SvskError, match=r"line 1: a message is from 'nobody', expected one of human"
    ):
        text({"conversations": [{"from": "nobody", "value": "why?"}]})
    with pytest.raises(
        SvskError, match="line 1: conversations is a str, expected a list of messages"
    ):
        text({"conversations": "why?"})
    alpaca = {"instruction": "Say it", "input": "twice", "output": said}
    assert f"Say it\ntwice\n{said}\n\n" in text(alpaca)
    assert f"<user>Say it\ntwice<assistant>{said}" in text(alpaca, chat_template=True)
    assert f"Say it\n{said}\n\n" in text({**alpaca, "input": ""})
    # Data sets with columns of several kinds have nulls where another one is in use.
    assert f"Say it\n{said}\n\n" in text({"text": None, **alpaca, "input": None})


def test_a_chat_template_that_nothing_is_rendered_with_is_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.txt").write_text("some text, and more of it. " * 80)
    for source, holds in (
        ("a.jsonl", "no row with messages"),
        ("a.txt", "plain text"),
        ("python", "documentation"),
    ):
        name = source if source == "python" else str(tmp_path / source)
        with pytest.raises(SvskError, match=f"--chat-template has no effect: .* has {holds}"):
            load_calibration(name, tokenizer, 2, 32, 0, chat_template=True)


def large(kind: str, count: int) -> bytes:
    """Numbered items, so that a sample tells its place."""
    if kind == "rows":
        return "".join(
            json.dumps({"text": f"<{i:07d}> caf\u00e9"}, ensure_ascii=False) + "\n"
            for i in range(count)
        ).encode()
    if kind == "list":
        return json.dumps([{"text": f"<{i:07d}>"} for i in range(count)]).encode()
    text = "".join(f"<{i:07d}> caf\u00e9" + ("\n" if i % 7 == 0 else " ") for i in range(count))
    if kind == "unbroken":
        text = text.replace("\n", "").replace(" ", "\u732b")
    found = text.encode("utf-16" if kind == "wide" else "utf-8")
    return gzip.compress(found) if kind == "packed" else found


@pytest.mark.parametrize("kind", ["text", "wide", "unbroken", "rows", "list", "packed"])
def test_samples_of_a_large_file_are_drawn_from_all_over_it(
    tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    path, count = tmp_path / "large", 24_000
    path.write_bytes(large(kind, count))
    found = load_calibration(str(path), tokenizer, 10, 48, 0)
    assert found.tokens.shape == (10, 48)
    texts = [tokenizer.decode(row).strip("\ufffd") for row in found.tokens]
    assert not any("\ufffd" in text or '"text"' in text for text in texts)
    places = [int(text.split("<")[1][:7]) for text in texts]
    for index, place in enumerate(places):
        assert count / 10 * index - 50 <= place <= count / 10 * (index + 1) + 50
    if kind in ("text", "rows"):
        assert all(text.startswith("<") for text in texts)  # at the beginning of a line
    assert load_calibration(str(path), tokenizer, 10, 48, 0).fingerprint == found.fingerprint
    assert load_calibration(str(path), tokenizer, 10, 48, 1).fingerprint != found.fingerprint


def test_samples_of_long_rows_do_not_overlap(tokenizer: Any, tmp_path: Path) -> None:
    """Several places in one row lead to the next one, of which each takes another part."""
    path = tmp_path / "articles.jsonl"
    texts = ("".join(f"{row:04}{word:05} " for word in range(5_000)) for row in range(10))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    drawn = load_calibration(str(path), tokenizer, 40, 64, 0).tokens
    words = [word for row in drawn for word in tokenizer.decode(row).split()[1:-1]]
    assert len(words) > 40 * 3
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("kind", ["text", "rows", "list", "packed"])
def test_memory_is_that_of_the_samples(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "large"
    peaks = []
    # A list is read item by item, which takes tracemalloc ten times as long: the parts that are
    # read at a time, 2 MiB together, are then not yet full at the smaller size.
    sizes, more = ((12_000, 60_000), 2 << 20) if kind == "list" else ((120_000, 600_000), 1 << 18)
    for count in sizes:
        path.write_bytes(large(kind, count))
        tracemalloc.start()
        load_calibration(str(path), tokenizer, 4, 32, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + more


def test_a_large_file_with_one_long_row_or_blank_parts(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": large("text", 20_000).decode()}))
    found = load_calibration(str(path), tokenizer, 4, 48, 0)
    assert len(torch.unique(found.tokens, dim=0)) == 4
    path = tmp_path / "blank.txt"
    path.write_text(large("text", 20_000).decode() + "\n" * 2000)
    assert load_calibration(str(path), tokenizer, 8, 48, 0).tokens.shape == (8, 48)


def test_a_row_without_an_end_is_given_up(
    load: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svsk_offline.calibration.files._LONGEST_ROW", 2 << 20)
    for content in (
        b'{"text": "a"}\n{"text": "' + b"a" * (3 << 20),
        b'[{"text": "' + b"a" * (8 << 20),
    ):
        with pytest.raises(SvskError, match=r"line \d: a row of more than 2 MiB. Is a quote"):
            load("open.json", content)


def test_only_regular_files(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "not a regular file"),
        ("nothing", "Calibration text .*nothing: no such file"),
        (".", "is a folder, expected a file"),
    ):
        with pytest.raises(SvskError, match=message):
            open_text(tmp_path / name)


class Config:
    """What transformers' configs have in common."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def get_text_config(self) -> "Config":
        return self


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (Config(max_position_embeddings=512), 512),
        (Config(max_position_embeddings=512, sliding_window=64), 512),
        (Config(n_positions=256), 256),
        (Config(max_position_embeddings=512, alibi=True), None),
        (Config(), None),
        (Config(max_position_embeddings=100, rope_parameters={"rope_type": "default"}), 100),
        (Config(max_position_embeddings=100, rope_scaling={"type": "linear", "factor": 4.0}), 400),
        (
            Config(
                max_position_embeddings=400,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 100,
                },
            ),
            400,
        ),
        (
            Config(
                max_position_embeddings=100,
                rope_parameters={"full_attention": {"rope_type": "linear", "factor": 2}},
            ),
            200,
        ),
    ],
)
def test_longest_sequence(config: Config, longest: int | None) -> None:
    assert longest_sequence(config) == longest
    if longest is not None:
        check_length(longest, config, "m")
        with pytest.raises(
            SvskError,
            match=f"--seq-len is {longest + 1}, but m takes {longest} tokens at most. Lower",
        ):
            check_length(longest + 1, config, "m")


def test_token_ids(tokenizer: Any) -> None:
    spell = tokenizer.convert_ids_to_tokens
    check_token_ids(torch.tensor([[0, 99]]), 100, spell, "m", "text.txt")
    with pytest.raises(
        SvskError,
        match=(
            r"m: its tokenizer makes token 258 \('<bos>'\) of text\.txt, but the model's vocabulary"
            r" has 258"
        ),
    ):
        check_token_ids(torch.tensor([[0, 258]]), 258, spell, "m", "text.txt")


def test_what_a_model_cannot_take_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """By the rows of its embedding and its positions; a run and a search alike."""
    import shutil

    from svsk_eval.tune.tune import tune
    from svsk_offline.pipeline import quantize
    from svsk_offline.recipe import load_recipe

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer = ModelSource(model).tokenizer
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"<|new|>{sentence}"}) for sentence in SENTENCES))
    recipe = load_recipe("fast").override({"calibration": {"samples": 12, "seq_len": 64}})
    long = recipe.override({"calibration": {"seq_len": 600}})
    for run, name in ((quantize, "out"), (tune, "out.yaml")):
        with pytest.raises(
            SvskError, match=r"token 320 \('<\|new\|>'\) of calibration text rows\.jsonl.* has 320"
        ):
            run(model, tmp_path / name, recipe, calibration=str(text))  # type: ignore[operator]
        with pytest.raises(
            SvskError, match=r"--seq-len is 600, but .*model takes 512 tokens at most"
        ):
            run(model, tmp_path / name, long, calibration=str(text))  # type: ignore[operator]
    left = [path for path in tmp_path.rglob("*") if path.is_file() and model not in path.parents]
    assert left == [text]
