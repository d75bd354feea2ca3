# SPDX-License-Identifier: Apache-2.0
"""Calibration text as tokens: what a tokenizer puts in front, and pieces of equal length."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from svsk_kernels.errors import SvskError

__all__ = [
    "CalibrationPart",
    "CalibrationSet",
    "bos_prefix",
    "cut_pieces",
    "pack_rows",
    "token_fingerprint",
    "without_prefix",
]

_PROBE: Final = "a text"
"""Tokenised to see what a tokenizer puts in front of a text."""


@dataclass(frozen=True)
class CalibrationPart:
    """What a mixture has of one source.

    Attributes:
        source: name of a file, a data set or a built-in text.
        weight: share of the samples that was asked for.
        samples: number of samples.
        fingerprint: SHA-256 of their tokens.
    """

    source: str
    weight: float
    samples: int
    fingerprint: str


@dataclass(frozen=True)
class CalibrationSet:
    """Tokens to run through the model, and what they are."""

    tokens: torch.Tensor  # int64 [samples, seq_len]
    source: str
    fingerprint: str  # SHA-256 of the tokens
    bos: bool = False  # every sample starts with what bos_prefix found
    parts: tuple[CalibrationPart, ...] = ()  # of a mixture, in the order of the samples

    def subset(self, samples: int | None) -> "CalibrationSet":
        """Some of the samples, spread evenly over all; None is all."""
        count = len(self.tokens)
        if samples is None or samples >= count:
            return self
        tokens = self.tokens[torch.linspace(0, count - 1, samples).round().long()]
        return replace(self, tokens=tokens, fingerprint=token_fingerprint(tokens), parts=())

    def first(self, samples: int) -> "CalibrationSet":
        """The first so many of the samples."""
        tokens = self.tokens[:samples]
        return replace(self, tokens=tokens, fingerprint=token_fingerprint(tokens), parts=())

    def picked(self, places: Sequence[int]) -> "CalibrationSet":
        """Some of the samples, by their numbers."""
        tokens = self.tokens[list(places)]
        return replace(self, tokens=tokens, fingerprint=token_fingerprint(tokens), parts=())

    def describe(self) -> dict[str, Any]:
        """What goes into ``producer.calibration``.

        ``bos`` only where there is one, ``parts`` only of a mixture.
        """
        samples, seq_len = self.tokens.shape
        described: dict[str, Any] = {
            "source": self.source,
            "samples": samples,
            "seq_len": seq_len,
            "fingerprint": self.fingerprint,
        }
        if self.parts:
            described["parts"] = [asdict(part) for part in self.parts]
        return {**described, "bos": True} if self.bos else described


def bos_prefix(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts in front of every text.

    That is one beginning-of-sequence token for Llama 3, Gemma or Mistral, two tokens for GLM, and
    none for Qwen or SmolLM2. A model is served with them, and many let all later tokens attend to
    the first one: without it their activations are others. What a tokenizer puts behind a text (an
    end-of-sequence token) is left out.

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow.

    Returns:
        Token ids, often none.

    Raises:
        SvskError: a text's tokens are not found among those it has with special tokens.
    """
    plain, served = (
        list(tokenizer(_PROBE, add_special_tokens=special)["input_ids"])
        for special in (False, True)
    )
    for start in range(len(served) - len(plain) + 1):
        if served[start : start + len(plain)] == plain:
            return served[:start]
    raise SvskError(
        f"The tokenizer {type(tokenizer).__name__} encodes {_PROBE!r} as {plain} without special"
        f" tokens and as {served} with them: what it puts in front of a text cannot be told apart."
    )


def cut_pieces(ids: Sequence[int], prefix: Sequence[int], seq_len: int) -> torch.Tensor:
    """Cut a stream of tokens into consecutive pieces, each behind the same prefix.

    Args:
        ids: the stream, without special tokens; what is left after the last whole piece is not
            used.
        prefix: what :func:`bos_prefix` found; when empty the pieces are the stream itself.
        seq_len: tokens per piece, prefix included.

    Returns:
        int64 [pieces, seq_len], of which the last ``seq_len - len(prefix)`` columns are the stream;
        maybe no piece.

    Raises:
        SvskError: a piece would hold no token of the stream.
    """
    width = seq_len - len(prefix)
    if width < 1:
        raise SvskError(
            f"--seq-len is {seq_len}, but the tokenizer puts {len(prefix)} token(s) in front of"
            f" every text: expected {len(prefix) + 1} or more."
        )
    pieces = len(ids) // width
    text = torch.tensor(ids[: pieces * width], dtype=torch.int64).view(pieces, width)
    front = torch.tensor(prefix, dtype=torch.int64).expand(pieces, len(prefix))
    return torch.cat([front, text], dim=1)


def pack_rows(rows: Iterable[list[int]], prefix: Sequence[int], width: int) -> Iterator[list[int]]:
    """Pieces of ``width`` tokens that begin where a row begins, for as long as there are rows.

    A piece is filled with the rows that follow, and the last of them is cut; what is cut off is
    left out, so that no piece begins in the middle of a conversation. Only a row that is longer
    than a piece goes on in the next one, for as many whole pieces as it has.

    Args:
        rows: tokens of each row. At the beginning of a piece, tokens of ``prefix`` at a row's own
            beginning are left out: a chat template may render them itself, and they stand in front
            of every piece anyway.
        prefix: what :func:`bos_prefix` found.
        width: tokens per piece, without ``prefix``.
    """
    piece: list[int] = []
    for ids in rows:
        if not piece:
            ids = without_prefix(ids, prefix)
            whole = len(ids) // width * width
            yield from (ids[start : start + width] for start in range(0, whole, width))
            piece = [] if whole else ids
        elif len(piece) + len(ids) < width:
            piece = piece + ids
        else:
            yield (piece + ids)[:width]
            piece = []


def without_prefix(ids: list[int], prefix: Sequence[int]) -> list[int]:
    """A row's tokens without those of ``prefix``, if it begins with them."""
    return ids[len(prefix) :] if prefix and ids[: len(prefix)] == list(prefix) else ids


def token_fingerprint(tokens: torch.Tensor) -> str:
    """SHA-256 of the bytes of int64 tokens, in hexadecimal. It does not depend on the shape."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
