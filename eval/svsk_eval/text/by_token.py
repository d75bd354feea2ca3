# SPDX-License-Identifier: Apache-2.0
"""KL by what is predicted: how far into a chunk a token stands, and what kind of token it is.

Everything is about the token that follows, as KL is: of chunk c and a group g of tokens, with n_gc
tokens there and a sum of KL of s_gc, C chunks,

    KL of g = sum_c s_gc / sum_c n_gc = r      share of g = sum_c s_gc / (sum of KL of all tokens)

The standard error is that of a ratio, chunks being the samples (Cochran, Sampling Techniques, 3rd
edition 1977, equation 6.13): se(r)^2 = C / (C - 1) sum_c (s_gc - r n_gc)^2 / (sum_c n_gc)^2. Where
all chunks have as many tokens of the group it is that of a mean.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from svsk_eval.text.series import FloatArray

__all__ = ["KINDS", "TokenGroup", "by_kind", "by_position", "kinds_of_tokens"]

KINDS: Final = {
    "special": "special tokens",
    "whitespace": "spaces and line breaks",
    "digits": "digits",
    "punctuation": "punctuation and symbols",
    "word start": "beginnings of words",
    "word continuation": "words going on",
    "part of a character": "parts of a character",
}
"""Kinds of tokens, and what they are called in a sentence."""

_ORDER: Final = tuple(KINDS)
_BROKEN: Final = "\N{REPLACEMENT CHARACTER}"

KindArray = npt.NDArray[np.int8]


@dataclass(frozen=True)
class TokenGroup:
    """Some of the predicted tokens, and how far a model is from its reference there.

    Attributes:
        name: a key of :data:`KINDS`; or positions, such as ``5-8``.
        tokens: how many.
        kl: mean of KL(reference || model), nats per token.
        kl_se: its standard error over chunks; None where a single chunk has such tokens.
        share: of the sum of KL over all tokens, 0 to 1; None where that is not above 0.
    """

    name: str
    tokens: int
    kl: float
    kl_se: float | None
    share: float | None


@dataclass(frozen=True)
class _Spelled:
    """What is to be known of a token's text: its kind, and how it goes on from the one before."""

    kind: str
    starts_apart: bool  # with a space
    ends_in_word: bool


def kinds_of_tokens(tokenizer: Any, tokens: npt.NDArray[np.int64]) -> KindArray:
    """Kinds of the tokens that each chunk predicts, all but its first.

    A token with letters begins a word if a space is its own first character or the token before
    does not end in a letter or digit; otherwise a word goes on. Tokens without letters are digits,
    or punctuation, or white space. Where a token is no whole character (a byte of one), it has a
    kind of its own, and the word goes on after it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tokens: ids, int64 [C, T].

    Returns:
        Indices into :data:`KINDS`, int8 [C, T - 1].
    """
    spelled = _spell(tokenizer, {int(token) for token in np.unique(tokens)})
    kinds = np.empty((tokens.shape[0], tokens.shape[1] - 1), dtype=np.int8)
    for row, chunk in enumerate(tokens.tolist()):
        for place, (before, token) in enumerate(pairwise(chunk)):
            kind = spelled[token].kind
            inside = spelled[before].ends_in_word and not spelled[token].starts_apart
            if kind == "word start" and inside:
                kind = "word continuation"
            kinds[row, place] = _ORDER.index(kind)
    return kinds


def by_kind(kl: FloatArray, kinds: KindArray) -> list[TokenGroup]:
    """KL by kind of token, those kinds that there are, in the order of :data:`KINDS`.

    Args:
        kl: of each predicted token, nats, float64 [C, T].
        kinds: of the tokens, from :func:`kinds_of_tokens`, int8 [C, T].
    """
    return _groups(kl, [(name, kinds == index) for index, name in enumerate(_ORDER)])


def by_position(kl: FloatArray) -> list[TokenGroup]:
    """KL by the number of tokens read before, in ranges that double: 1, 2, 3-4, 5-8 and so on.

    Args:
        kl: of each predicted token, nats, float64 [C, T].
    """
    read = np.arange(1, kl.shape[1] + 1)
    groups = []
    last = 0
    while last < kl.shape[1]:
        first, last = last + 1, min(max(1, 2 * last), kl.shape[1])
        name = str(first) if first == last else f"{first}-{last}"
        groups.append((name, np.broadcast_to((first <= read) & (read <= last), kl.shape)))
    return _groups(kl, groups)


def _groups(kl: FloatArray, masks: Sequence[tuple[str, npt.NDArray[np.bool_]]]) -> list[TokenGroup]:
    total = float(kl.sum())
    groups = []
    for name, mask in masks:
        counts, sums = mask.sum(axis=1), np.where(mask, kl, 0.0).sum(axis=1)
        tokens, chunks = int(counts.sum()), len(counts)
        if not tokens:
            continue
        mean, error = float(sums.sum()) / tokens, None
        if np.count_nonzero(counts) > 1:
            spread = float(np.square(sums - mean * counts).sum()) * chunks / (chunks - 1)
            error = spread**0.5 / tokens
        share = float(sums.sum()) / total if total > 0 else None
        groups.append(TokenGroup(name, tokens, mean, error, share))
    return groups


def _spell(tokenizer: Any, ids: Iterable[int]) -> dict[int, _Spelled]:
    """What is to be known of the texts of tokens."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}
    # Behind another token: decoders drop the space of a text's first one.
    front = tokenizer("a", add_special_tokens=False)["input_ids"]
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(front, **plain)
    spelled = {}
    for token in ids:
        if token in special:
            spelled[token] = _Spelled("special", True, False)
        else:
            text = tokenizer.decode([*front, token], **plain).removeprefix(before)
            spelled[token] = _Spelled(
                _kind(text), text[:1].isspace(), _in_word(text[-1:]) or text[-1:] == _BROKEN
            )
    return spelled


def _kind(text: str) -> str:
    """Kind of a token by its text; one with letters as if it stood alone."""
    if not text.strip():
        return "whitespace"
    letters = [letter for letter in text if _in_word(letter)]
    if not letters:
        return "part of a character" if _BROKEN in text else "punctuation"
    return "digits" if all(letter.isdigit() for letter in letters) else "word start"


def _in_word(letter: str) -> bool:
    """Whether a character is a letter, a digit, or a mark on one (no character is not)."""
    return letter.isalnum() or (letter != "" and unicodedata.category(letter).startswith("M"))
