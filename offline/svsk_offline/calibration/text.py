# SPDX-License-Identifier: Apache-2.0
"""Calibration text: where it comes from, and how it becomes tokens."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from svsk_offline.errors import SvskError

__all__ = [
    "DEFAULT_SOURCE",
    "CalibrationSet",
    "bos_prefix",
    "cut_pieces",
    "load_calibration",
    "token_fingerprint",
]

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

_PROBE: Final = "a text"
"""Tokenised to see what a tokenizer puts in front of a text."""


@dataclass(frozen=True)
class CalibrationSet:
    """Tokens to run through the model, and what they are."""

    tokens: torch.Tensor  # int64 [samples, seq_len]
    source: str
    fingerprint: str  # SHA-256 of the tokens
    bos: bool = False  # every sample starts with what bos_prefix found

    def subset(self, samples: int | None) -> "CalibrationSet":
        """Some of the samples, spread evenly over all; None is all."""
        count = len(self.tokens)
        if samples is None or samples >= count:
            return self
        tokens = self.tokens[torch.linspace(0, count - 1, samples).round().long()]
        return replace(self, tokens=tokens, fingerprint=token_fingerprint(tokens))

    def describe(self) -> dict[str, Any]:
        """What goes into the checkpoint's ``producer.calibration``; ``bos`` only where there is one."""
        samples, seq_len = self.tokens.shape
        described = {"source": self.source, "samples": samples, "seq_len": seq_len, "fingerprint": self.fingerprint}
        return {**described, "bos": True} if self.bos else described


def bos_prefix(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts in front of every text.

    That is one beginning-of-sequence token for Llama 3, Gemma or Mistral, two tokens for GLM, and none for Qwen or
    SmolLM2. A model is served with them, and many let all later tokens attend to the first one: without it their
    activations are others. What a tokenizer puts behind a text (an end-of-sequence token) is left out.

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow.

    Returns:
        Token ids, often none.

    Raises:
        SvskError: a text's tokens are not found among those it has with special tokens.
    """
    plain, served = (list(tokenizer(_PROBE, add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(served) - len(plain) + 1):
        if served[start : start + len(plain)] == plain:
            return served[:start]
    raise SvskError(
        f"The tokenizer {type(tokenizer).__name__} encodes {_PROBE!r} as {plain} without special tokens and as "
        f"{served} with them: what it puts in front of a text cannot be told apart."
    )


def cut_pieces(ids: Sequence[int], prefix: Sequence[int], seq_len: int) -> torch.Tensor:
    """Cut a stream of tokens into consecutive pieces that do not overlap, each behind the same prefix.

    Args:
        ids: the stream, without special tokens; what is left after the last whole piece is not used.
        prefix: what :func:`bos_prefix` found; when empty the pieces are the stream itself.
        seq_len: tokens per piece, prefix included.

    Returns:
        int64 [pieces, seq_len], of which the last ``seq_len - len(prefix)`` columns are the stream; maybe no piece.

    Raises:
        SvskError: a piece would hold no token of the stream.
    """
    width = seq_len - len(prefix)
    if width < 1:
        raise SvskError(
            f"--seq-len is {seq_len}, but the tokenizer puts {len(prefix)} token(s) in front of every text: expected "
            f"{len(prefix) + 1} or more."
        )
    pieces = len(ids) // width
    text = torch.tensor(ids[: pieces * width], dtype=torch.int64).view(pieces, width)
    front = torch.tensor(prefix, dtype=torch.int64).expand(pieces, len(prefix))
    return torch.cat([front, text], dim=1)


def token_fingerprint(tokens: torch.Tensor) -> str:
    """SHA-256 of the bytes of int64 tokens, in hexadecimal. It does not depend on the shape."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def load_calibration(
    source: str, tokenizer: Any, samples: int, seq_len: int, seed: int, *, chat_template: bool = False
) -> CalibrationSet:
    """Tokenise calibration text and draw samples from all over it.

    The text is tokenised as one stream and cut into pieces of ``seq_len``; of each of ``samples`` equal parts of the
    stream one piece is drawn with the seed. Where the tokenizer puts a beginning-of-sequence token in front of a text
    (:func:`bos_prefix`), every piece starts with it and holds that many tokens of the stream less.

    A chat template may render that token itself (``<s>`` at the beginning of a conversation). It stays in the stream,
    where it marks the conversation's beginning as it does when the model is served. Pieces are cut regardless of
    conversations, so only a piece that happens to start with a conversation, like the first one, has it twice.

    Args:
        source: ``python`` (standard library), a text file, a ``.jsonl`` file, or the name of a ``datasets`` dataset,
            as ``name``, ``name:split`` or ``name:config:split``. Rows of JSONL and datasets may hold ``text``,
            ``messages`` (rendered with the chat template), ``question`` and ``answer``, or ``prompt`` and
            ``completion``.
        tokenizer: the model's tokenizer.
        samples: number of samples.
        seq_len: tokens per sample, with the beginning-of-sequence token.
        seed: of the draw.
        chat_template: render question and answer, prompt and completion, as a user's and an assistant's message.

    Raises:
        SvskError: no such source, a row that holds none of these, messages that the chat template rejects, too
            little text, or samples too short for a token of text.
    """
    prefix = bos_prefix(tokenizer)
    needed = samples * (seq_len - len(prefix))
    ids: list[int] = []
    for text in _documents(source, tokenizer, chat_template):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= _MIN_CHARACTERS_PER_TOKEN * needed:
            break
    stream = cut_pieces(ids, prefix, seq_len)
    pieces = len(stream)
    if pieces < samples:
        width = f"{seq_len - len(prefix)}{' after BOS' if prefix else ''}"
        raise SvskError(
            f"Calibration text {source} has {len(ids)} tokens, {pieces} pieces of {width}; {samples} samples are "
            "asked for. Give more text, or lower --samples or --seq-len."
        )
    generator = torch.Generator().manual_seed(seed)
    edges = torch.linspace(0, pieces, samples + 1).long()
    draw = torch.rand(samples, generator=generator)
    chosen = edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()
    tokens = stream[chosen].contiguous()
    name = Path(source).name if Path(source).exists() else source
    return CalibrationSet(tokens, name, token_fingerprint(tokens), bos=bool(prefix))


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
    if not all(isinstance(message, Mapping) for message in messages):
        raise SvskError(f"Calibration {where}: messages must be objects with role and content.")
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        # Templates raise the first on purpose; contents that are null or a list, and no message at all, the others.
        raise SvskError(
            f"Calibration {where}: the model's chat template rejects its messages ({error}). Mend or drop the row."
        ) from error
