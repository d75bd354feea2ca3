# SPDX-License-Identifier: Apache-2.0
"""From a row of a data set to text: plain, of question and answer, or of a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from svsk_kernels.errors import SvskError

__all__ = ["CONVERSATIONS", "RowReader", "messages_of", "string_of"]

_PAIRS: Final = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))
"""Question and answer; Alpaca's rows may have an ``input`` that goes with the instruction."""

CONVERSATIONS: Final = ("messages", "conversations")
"""Keys of a row that hold a conversation."""

_KINDS: Final = (("text",), *((name,) for name in CONVERSATIONS), *_PAIRS)
"""Keys of the kinds of rows, in the order in which they are looked for."""

_EXPECTED: Final = (
    "text, messages, conversations, question and answer,"
    " prompt and completion, or instruction and output"
)

_SPEAKERS: Final = {
    "user": "human user prompter",
    "assistant": "gpt assistant chatgpt bard bing model",
    "system": "system",
    "tool": "tool observation",
}
_ROLES: Final = {name: role for role, names in _SPEAKERS.items() for name in names.split()}
"""ShareGPT's speakers as roles of a chat template."""


class RowReader:
    """Makes text of rows.

    Args:
        tokenizer: the model's, whose chat template renders conversations.
        chat_template: render question and answer, and the like, as a user's and an assistant's
            message.

    Attributes:
        rendered: whether any row so far was a conversation, or was made one.
    """

    def __init__(self, tokenizer: Any, chat_template: bool) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.rendered = False
        self._taken: dict[tuple[str, ...], bool] = {}

    def text(self, row: Any, where: str) -> str:
        """The text of one row.

        Args:
            row: an object with the keys of a kind of rows; others are ignored.
            where: names it in errors.

        Raises:
            SvskError: it is none of the kinds, a value that is needed is missing or of another
                type, or the chat template rejects it.
        """
        if not isinstance(row, Mapping):
            raise SvskError(f"{where}: a {type(row).__name__}, expected an object.")
        keys = next(
            (keys for keys in _KINDS if all(row.get(key) is not None for key in keys)), None
        )
        if keys is None:
            raise self._unknown(row, where)
        text = self._text(row, keys, where)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SvskError(
                f"Calibration {where}: holds \\u{ord(text[error.start]):04x}, half of a pair that"
                " is no character."
            ) from error
        return text

    def conversation(self, messages: Sequence[Mapping[str, str]], where: str) -> str:
        """A conversation of this package, rendered as far as the chat template allows.

        Where a template knows no system's role, the system's message opens the user's. Without a
        template, or with one that refuses a plain question and answer (a set of templates without
        a default, say), it is plain text: what a model is calibrated on by default is no reason to
        refuse the model.

        Args:
            messages: perhaps a system's message, then user and assistant in turn.
            where: names it in errors.
        """
        if not self._renders("user", "assistant"):
            return "\n\n".join(message["content"] for message in messages) + "\n\n\n"
        if messages[0]["role"] == "system" and not self._renders("system", "user", "assistant"):
            system, first, *rest = messages
            content = f"{system['content']}\n\n{first['content']}"
            messages = [{"role": "user", "content": content}, *rest]
        return self._render(messages, where)

    def _renders(self, *roles: str) -> bool:
        """Whether the tokenizer has a chat template that takes messages of these roles."""
        if roles not in self._taken:
            messages = [{"role": role, "content": "Hello."} for role in roles]
            try:
                self._taken[roles] = self._render(messages, "").count("Hello.") == len(roles)
            except SvskError:
                self._taken[roles] = False
        return self._taken[roles]

    def _text(self, row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
        if keys[0] in CONVERSATIONS:
            return self._render(messages_of(row[keys[0]], keys[0], f"Calibration {where}"), where)
        values = {key: string_of(row[key], key, f"Calibration {where}") for key in keys}
        if keys == ("text",):
            return values["text"] + "\n\n"
        question, answer = values.values()
        extra = row.get("input") if keys[0] == "instruction" else None
        if extra:
            question += "\n" + string_of(extra, "input", f"Calibration {where}")
        if self.chat_template:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            return self._render(messages, where)
        return f"{question}\n{answer}\n\n"

    def _unknown(self, row: Mapping[str, Any], where: str) -> SvskError:
        for keys in _KINDS:
            missing = [key for key in keys if key in row and row[key] is None]
            if missing and all(key in row for key in keys):
                return SvskError(
                    f"Calibration {where}: {missing[0]} is null. Drop the row, or give it a value."
                )
        return SvskError(
            f"Calibration {where}: has"
            f" {', '.join(map(str, row)) or 'no key'}; expected {_EXPECTED}."
        )

    def _render(self, messages: Sequence[Mapping[str, Any]], where: str) -> str:
        self.rendered = True
        if not getattr(self.tokenizer, "chat_template", None):
            raise SvskError(
                f"Calibration {where}: holds messages, but the"
                " model's tokenizer has no chat template."
            )
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False))
        except (TemplateError, TypeError, ValueError) as error:
            # Templates raise the first on purpose; contents that are null or a list, and no message
            # at all, the others.
            raise SvskError(
                f"Calibration {where}: the model's chat template rejects its messages ({error})."
                " Mend or drop the row."
            ) from error


def string_of(value: Any, key: str, where: str) -> str:
    """A row's value that must be text.

    Raises:
        SvskError: it is none.
    """
    if not isinstance(value, str):
        raise SvskError(f"{where}: {key} is a {type(value).__name__}, expected a string.")
    return value


def messages_of(value: Any, key: str, where: str) -> list[Mapping[str, Any]]:
    """A row's messages with role and content; ShareGPT's ``from`` and ``value`` are renamed.

    Args:
        value: of the row's ``key``.
        key: ``messages`` or ``conversations``.
        where: names the row in errors.

    Raises:
        SvskError: they are no list of objects, or one is from a speaker that is not known.
    """
    if not isinstance(value, list):
        raise SvskError(f"{where}: {key} is a {type(value).__name__}, expected a list of messages.")
    if not all(isinstance(message, Mapping) for message in value):
        raise SvskError(
            f"{where}: messages must be objects with role and content, or from and value."
        )
    messages: list[Mapping[str, Any]] = []
    for message in value:
        if "role" in message or "from" not in message:
            messages.append(message)
            continue
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
            raise SvskError(
                f"{where}: a message is from {speaker!r}, expected one of {', '.join(_ROLES)}."
            )
        messages.append({"role": _ROLES[speaker.lower()], "content": message.get("value")})
    return messages
