# SPDX-License-Identifier: Apache-2.0
"""A model folder's tokenizer in GGUF's metadata, as llama.cpp's own converter writes it.

Only byte-level BPE: what llama.cpp calls ``gpt2``. llama.cpp cuts text by rules of its own, which a
name selects (``tokenizer.ggml.pre``, src/llama-vocab.cpp); which one is told here by the rules that
tokenizer.json states, and a tokenizer with others is refused.
"""

import re
from pathlib import Path
from typing import Any, Final

import gguf

from svsk_kernels.errors import SvskError
from svsk_vllm.format.files import MAX_INDEX_BYTES, read_json

__all__ = ["add_tokenizer", "pre_tokenizer_name"]

_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAME_OF_PATTERN: Final = {
    _QWEN2: "qwen2",
    _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1): "llama-bpe",
}
_CONTROL: Final = re.compile("<[|\uff5c].*[|\uff5c]>")
"""Tokens that are no text although tokenizer.json does not call them special, such as Qwen's
``<|fim_prefix|>``; llama.cpp's converter tells them by their looks too."""
_PAD: Final = "[PAD{}]"
"""Name of a row of the embedding that no token has."""
_NORMALIZERS: Final = (None, "NFC")
"""llama.cpp normalises nothing; its converter drops Qwen's NFC, which changes few texts."""


def pre_tokenizer_name(tokenizer: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of the rules by which a tokenizer.json cuts text.

    Args:
        tokenizer: content of tokenizer.json.
        path: its name, for the error.

    Raises:
        SvskError: llama.cpp has the rules under no name that is known here.
    """
    rules = tokenizer.get("pre_tokenizer") or {}
    parts = rules.get("pretokenizers", [rules])
    last = parts[-1] if parts else {}
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    is_bpe = (tokenizer.get("model") or {}).get("type") == "BPE"
    if byte_level and is_bpe and normalizer in _NORMALIZERS:
        first, own = parts[:-1], last.get("use_regex", True)
        if not first and own:
            return "gpt-2"
        if own and len(first) == 1 and first[0].get("type") == "Digits":
            if first[0].get("individual_digits"):
                return "smollm"
        elif not own and len(first) == 1 and first[0].get("type") == "Split":
            pattern = (first[0].get("pattern") or {}).get("Regex")
            if pattern in _NAME_OF_PATTERN and first[0].get("behavior") == "Isolated":
                return _NAME_OF_PATTERN[pattern]
    raise SvskError(
        f"{path}: cuts text by rules that are not known here under a name of llama.cpp's. Give a"
        " GGUF file of the same model with --template: its tokenizer is taken."
    )


def add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer, its special tokens and the chat template.

    Args:
        writer: a ``gguf.GGUFWriter``.
        folder: model folder with tokenizer.json.
        rows: of the embedding; rows without a token get names of their own.

    Raises:
        SvskError: there is none that llama.cpp has rules for, or it has more tokens than rows.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SvskError(
            f"{path}: no such file. Give a GGUF file of the same model with --template: its"
            " tokenizer is taken."
        )
    tokenizer = read_json(path, MAX_INDEX_BYTES)
    name = pre_tokenizer_name(tokenizer, path)
    tokens = [_PAD.format(index) for index in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    added = {int(token["id"]): token for token in tokenizer.get("added_tokens", [])}
    vocabulary = {int(index): text for text, index in tokenizer["model"]["vocab"].items()}
    for index, text in (vocabulary | {i: token["content"] for i, token in added.items()}).items():
        if not 0 <= index < rows:
            raise SvskError(
                f"{path}: token {text!r} is number {index}, the embedding has {rows} rows. The"
                " folder's files are of different models: copy it again."
            )
        tokens[index], types[index] = text, gguf.TokenType.NORMAL
        if index in added:
            control = added[index].get("special") or _CONTROL.fullmatch(text)
            types[index] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows).add_to_gguf(writer, quiet=True)
