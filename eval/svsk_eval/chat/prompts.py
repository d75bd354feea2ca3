# SPDX-License-Identifier: Apache-2.0
"""Prompts of a chat: rows of a file as messages that are to be answered, and their tokens."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from svsk_eval.errors import EvalError
from svsk_eval.text.models import load_tokenizer
from svsk_kernels.errors import one_line
from svsk_offline.calibration.files import open_text
from svsk_offline.calibration.rows import CONVERSATIONS, messages_of, string_of

__all__ = ["OPTION", "Prompt", "read_prompts", "rendered_prompts", "shared_prompts"]

OPTION: Final = "--chat"

_QUESTIONS: Final = ("question", "prompt", "instruction", "text")
"""Keys of a row that hold what a user asks, in the order in which they are looked for."""


@dataclass(frozen=True)
class Prompt:
    """Messages that are to be answered.

    Attributes:
        where: file and line, for errors.
        messages: with ``role`` and ``content``; the last is not the assistant's.
    """

    where: str
    messages: tuple[Mapping[str, Any], ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the messages."""
        text = json.dumps([dict(message) for message in self.messages], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_prompts(path: Path, count: int) -> list[Prompt]:
    """The first prompts of a file.

    Rows hold ``messages`` or ``conversations``, whose assistant's last message is left out, or what
    a user asks under ``question``, ``prompt``, ``instruction`` (with Alpaca's ``input``) or
    ``text``; whatever answers stand beside it are not used.

    Args:
        path: JSON lines or a JSON list, gzip-compressed or not.
        count: how many, 1 or more.

    Raises:
        EvalError: there are fewer, the file holds no rows, or a row holds no prompt.
        SvskError: the file cannot be read, or a value is of another type.
    """
    if count < 1:
        raise EvalError(f"--prompts is {count}, expected 1 or more.")
    file = open_text(path, OPTION)
    if file.kind not in ("lines", "values"):
        held = "parquet" if file.kind == "parquet" else "plain text"
        raise EvalError(
            f"{OPTION} {path}: holds {held}, expected JSON: an object with messages, or with a"
            " question, a prompt or an instruction, per line."
        )
    prompts = [_prompt(row, f"{OPTION} {where}") for where, row in islice(file.rows(), count)]
    if len(prompts) < count:
        raise EvalError(
            f"{OPTION} {path}: holds {len(prompts)} prompts, fewer than the {count} asked for. Give"
            f" --prompts {max(1, len(prompts))}, or a longer file."
        )
    return prompts


def rendered_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, model: str | Path
) -> list[str]:
    """Prompts as the model's chat template puts them, up to where the assistant begins.

    Args:
        prompts: the messages.
        tokenizer: the model's.
        model: its folder or name, for errors.

    Raises:
        EvalError: there is no chat template, it rejects messages, or they hold half a character.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise EvalError(
            f"{model}: its tokenizer has no chat template, so there is no telling how it is asked."
            f" {OPTION} is for models that answer; give one, or score a text with --text."
        )
    from jinja2 import TemplateError

    texts = []
    for prompt in prompts:
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in prompt.messages],
                tokenize=False,
                add_generation_prompt=True,
            )
            str(text).encode()
        except UnicodeEncodeError as error:
            raise EvalError(
                f"{prompt.where}: holds \\u{ord(error.object[error.start]):04x}, half of a pair"
                " that is no character. Mend or drop the row."
            ) from error
        # Templates raise the first on purpose; contents that are null or a list the others.
        except (TemplateError, TypeError, ValueError) as error:
            raise EvalError(
                f"{prompt.where}: the chat template of {model} rejects its messages"
                f" ({one_line(error)}). Mend or drop the row."
            ) from error
        texts.append(str(text))
    return texts


def shared_prompts(
    prompts: Sequence[Prompt],
    model: str | Path,
    reference: str | Path,
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedTokenizerBase, list[list[int]]]:
    """The reference's tokenizer, and its tokens of each prompt, which must be the model's too.

    Args:
        prompts: the messages.
        model: folder or hub name.
        reference: the same of the model that answers.
        trust_remote_code: run Python files that come with the models.

    Raises:
        EvalError: see :func:`rendered_prompts`; or the two models' tokenizers or chat templates
            differ.
    """
    tokenizers, tokens = [], []
    for path in (reference, model):
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        texts = rendered_prompts(prompts, tokenizer, path)
        tokenizers.append(tokenizer)
        # a template writes the special tokens, that of the beginning among them
        tokens.append(
            [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        )
    if tokens[0] != tokens[1] or tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise EvalError(
            f"The tokenizers or chat templates of {model} and of the reference {reference} differ,"
            " so they would not be asked the same. Give the model that was quantised as the"
            " reference, or copy its tokenizer files."
        )
    return tokenizers[0], tokens[0]


def _prompt(row: Any, where: str) -> Prompt:
    if not isinstance(row, Mapping):
        raise EvalError(f"{where}: a {type(row).__name__}, expected an object.")
    key = next((key for key in (*CONVERSATIONS, *_QUESTIONS) if row.get(key) is not None), None)
    if key is None:
        raise EvalError(
            f"{where}: has {', '.join(map(str, row)) or 'no key'}, and none of"
            f" {', '.join((*CONVERSATIONS, *_QUESTIONS))}, which hold a prompt."
        )
    if key not in CONVERSATIONS:
        question = string_of(row[key], key, where)
        if key == "instruction" and row.get("input"):
            question += "\n" + string_of(row["input"], "input", where)
        return Prompt(where, ({"role": "user", "content": question},))
    messages = messages_of(row[key], key, where)
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    if not any(message.get("role") == "user" for message in messages):
        raise EvalError(f"{where}: no user's message is there to be answered. Drop the row.")
    return Prompt(where, tuple(messages))
