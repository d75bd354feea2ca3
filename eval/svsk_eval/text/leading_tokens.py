# SPDX-License-Identifier: Apache-2.0
"""Tokens from the beginning of a text file, which may be larger than memory."""

import codecs
from pathlib import Path
from typing import Any, Final

from svsk_eval.errors import EvalError

__all__ = ["leading_tokens"]

_BYTES: Final = 8
"""Read per token at first; more where that is not enough."""

_MARGIN: Final = 64
"""Tokens read beyond those used: the end of a part may have others than in the whole text."""


def leading_tokens(path: Path, tokenizer: Any, needed: int | None) -> list[int]:
    """Tokens of a text from its beginning, without special tokens.

    Little more is read than that takes.

    Args:
        path: plain UTF-8 text.
        tokenizer: a Hugging Face tokenizer.
        needed: how many, or None for all.

    Returns:
        Token ids, ``needed`` or more, or all there are.

    Raises:
        EvalError: the file cannot be read, or what was read of it is not UTF-8.
    """
    size = -1 if needed is None else _BYTES * (needed + _MARGIN)
    while True:
        try:
            # Not read_text: its newline translation would score another text than the file's on
            # some platforms.
            with path.open("rb") as file:
                raw = file.read(size)
            whole = needed is None or len(raw) < size
            text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
        except OSError as error:
            raise EvalError(
                f"{path}: cannot read the text to score ({error.strerror}). Name a plain text file."
            ) from error
        except UnicodeDecodeError as error:
            raise EvalError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start})."
            ) from error
        if not whole:  # to the end of a line: a word that is cut has other tokens
            text = text[: text.rfind("\n") + 1] or text
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if whole or needed is None or len(tokens) >= needed + _MARGIN:
            return tokens
        size *= 2
