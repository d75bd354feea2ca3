# SPDX-License-Identifier: Apache-2.0
"""Calibration text: where it comes from, and how it becomes tokens."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from svsk_offline.errors import SvskError

__all__ = ["DEFAULT_SOURCE", "CalibrationSet", "load_calibration"]

DEFAULT_SOURCE: Final = "python"
"""Name of the text that needs no download: documentation and sources of Python's standard library."""

_STANDARD_MODULES: Final = (
    "argparse", "ast", "asyncio.base_events", "collections", "csv", "dataclasses", "datetime", "decimal", "difflib",
    "email.message", "fractions", "heapq", "http.client", "inspect", "json.decoder", "logging", "pathlib", "pickle",
    "random", "shutil", "statistics", "subprocess", "tarfile", "textwrap", "threading", "typing", "unittest.mock",
    "urllib.parse", "zipfile",
)  # fmt: skip

_MIN_CHARACTERS_PER_TOKEN: Final = 8
"""Text is read until it surely holds enough tokens; English and code have 3 to 5 characters a token."""


@dataclass(frozen=True)
class CalibrationSet:
    """Tokens to run through the model, and what they are."""

    tokens: torch.Tensor  # int64 [samples, seq_len]
    source: str
    fingerprint: str  # SHA-256 of the tokens

    def describe(self) -> dict[str, Any]:
        """What goes into the checkpoint's ``producer.calibration``."""
        samples, seq_len = self.tokens.shape
        return {"source": self.source, "samples": samples, "seq_len": seq_len, "fingerprint": self.fingerprint}


def load_calibration(
    source: str, tokenizer: Any, samples: int, seq_len: int, seed: int, *, chat_template: bool = False
) -> CalibrationSet:
    """Tokenise calibration text and draw samples from all over it.

    The text is tokenised as one stream and cut into pieces of ``seq_len``; of each of ``samples`` equal parts of the
    stream one piece is drawn with the seed.

    Args:
        source: ``python`` (standard library), a text file, a ``.jsonl`` file, or the name of a ``datasets`` dataset,
            as ``name``, ``name:split`` or ``name:config:split``. Rows of JSONL and datasets may hold ``text``,
            ``messages`` (rendered with the chat template), ``question`` and ``answer``, or ``prompt`` and
            ``completion``.
        tokenizer: the model's tokenizer.
        samples: number of samples.
        seq_len: tokens per sample.
        seed: of the draw.
        chat_template: render question and answer, prompt and completion, as a user's and an assistant's message.

    Raises:
        SvskError: no such source, a row that holds none of these, or too little text.
    """
    needed = samples * seq_len
    ids: list[int] = []
    for text in _documents(source, tokenizer, chat_template):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= _MIN_CHARACTERS_PER_TOKEN * needed:
            break
    pieces = len(ids) // seq_len
    if pieces < samples:
        raise SvskError(
            f"Calibration text {source} has {len(ids)} tokens, {pieces} pieces of {seq_len}; {samples} samples are "
            "asked for. Give more text, or lower --samples or --seq-len."
        )
    generator = torch.Generator().manual_seed(seed)
    edges = torch.linspace(0, pieces, samples + 1).long()
    draw = torch.rand(samples, generator=generator)
    chosen = edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()
    tokens = torch.tensor(ids[: pieces * seq_len]).view(pieces, seq_len)[chosen].contiguous()
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    name = Path(source).name if Path(source).exists() else source
    return CalibrationSet(tokens, name, digest)


def _documents(source: str, tokenizer: Any, chat_template: bool) -> Iterator[str]:
    path = Path(source)
    if source == DEFAULT_SOURCE:
        yield from _standard_library()
    elif path.suffix in (".jsonl", ".json"):
        for number, row in enumerate(_json_lines(path), 1):
            yield _row_text(row, f"{path}, line {number}", tokenizer, chat_template)
    elif path.is_dir():
        raise SvskError(f"Calibration text {path}: is a folder, expected a file.")
    elif path.exists():
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SvskError(f"Calibration text {path}: not UTF-8 ({error}).") from error
    elif path.suffix or source.startswith((".", "/", "~")):
        raise SvskError(f"Calibration text {path}: no such file.")
    else:
        for number, row in enumerate(_dataset_rows(source), 1):
            yield _row_text(row, f"{source}, row {number}", tokenizer, chat_template)


def _standard_library() -> Iterator[str]:
    """Prose about Python, then code and docstrings, in turn so that every part of the stream has both."""
    from pydoc_data.topics import topics

    prose = [topics[key] for key in sorted(topics)]
    sources = []
    for name in _STANDARD_MODULES:
        found = importlib.util.find_spec(name)
        if found and found.origin and found.origin.endswith(".py"):
            sources.append(Path(found.origin).read_text(encoding="utf-8"))
    step = -(-len(prose) // max(1, len(sources)))
    for index, code in enumerate(sources):
        yield "\n\n".join(prose[index * step : (index + 1) * step])
        yield code


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.exists():
        raise SvskError(f"Calibration text {path}: no such file.")
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SvskError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise SvskError(f"{path}, line {number}: a {type(row).__name__}, expected an object.")
            yield row


def _dataset_rows(source: str) -> Iterator[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SvskError(f"Calibration {source}: not a file, and the package `datasets` is not installed.") from error
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        yield from load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the package raises many kinds, all meaning that the data cannot be had
        raise SvskError(f"Calibration {source}: neither a file nor a dataset that can be loaded ({error}).") from error


def _row_text(row: Mapping[str, Any], where: str, tokenizer: Any, chat_template: bool) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"]) + "\n\n"
    if isinstance(row.get("messages"), list):
        return _render(row["messages"], where, tokenizer)
    for asked, answered in (("question", "answer"), ("prompt", "completion")):
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            if chat_template:
                messages = [
                    {"role": "user", "content": row[asked]},
                    {"role": "assistant", "content": row[answered]},
                ]
                return _render(messages, where, tokenizer)
            return f"{row[asked]}\n{row[answered]}\n\n"
    raise SvskError(
        f"Calibration {where}: has {', '.join(map(str, row))}; expected text, messages, question and answer, or "
        "prompt and completion."
    )


def _render(messages: list[Any], where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise SvskError(f"Calibration {where}: holds messages, but the model's tokenizer has no chat template.")
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
