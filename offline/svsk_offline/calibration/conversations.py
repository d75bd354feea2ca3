# SPDX-License-Identifier: Apache-2.0
"""Conversations in messages form: written by hand, about Python's library, and about tables."""

import ast
import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

__all__ = ["Messages", "conversations", "parse_conversation"]

Messages = list[dict[str, str]]
"""Messages with ``role`` and ``content``."""

_SYSTEM: Final = (
    "You are a helpful assistant.",
    "You are a helpful, honest and concise assistant.",
    "You are an experienced software engineer. Answer with code where it helps.",
    "You are a patient teacher who explains things step by step.",
    "Answer in the language of the question.",
    "You are a careful editor. Keep the author's meaning and tone.",
    "Answer briefly. If you do not know something, say so.",
    "You are a data analyst. Reply in Markdown.",
)

_ASK_MEANING: Final = (
    "What does `{name}` in Python do?",
    "Can you explain Python's `{name}`?",
    "How do I use `{name}`? Give me its signature too.",
    "I came across `{name}` in a code review. What is it for?",
)
_ASK_SOURCE: Final = (
    "Show me how `{name}` could be implemented in Python.",
    "Write a Python function `{function}` that does the following: {first}",
    "How is `{name}` implemented in the standard library?",
)
_ASK_DOCSTRING: Final = (
    "Write a docstring for this function:\n\n```python\n{bare}\n```",
    "What does the following code do?\n\n```python\n{bare}\n```",
    "Please document this:\n\n```python\n{bare}\n```",
)

_LONGEST: Final = 2400
"""Characters of a function that is asked about: question and answer fit into a sample or two."""

_NAMES: Final = "Ana Boris Carla Deniz Emre Fatou Gita Hugo Ivy Jan Kim Lena Milan Noor".split()  # noqa: SIM905
_CITIES: Final = "Berlin Lagos Lima Osaka Porto Quito Riga Seoul Turin Tunis".split()  # noqa: SIM905
_PRODUCTS: Final = "cable chair clock drill fan kettle lamp monitor mug router scale tent".split()  # noqa: SIM905


def conversations(
    rng: random.Random, shipped: Sequence[str], sources: Mapping[str, str]
) -> Iterator[Messages]:
    """Conversations without end: every one of ``shipped`` before any is repeated.

    Args:
        rng: what is made up, and in which order.
        shipped: conversations as :func:`parse_conversation` reads them; a line ``[en]`` at the
            beginning of one gives its language, which those that are joined have in common.
        sources: Python modules by their names, whose functions are asked about.
    """
    functions = _functions_in_turn(rng, sources)
    by_language: dict[str, list[Messages]] = {}
    for text in shipped:
        first, _, rest = text.partition("\n")
        by_language.setdefault(first.strip("[]"), []).append(parse_conversation(rest))
    while True:
        written = [
            messages
            for language in by_language.values()
            for messages in _joined(rng, rng.sample(language, len(language)))
        ]
        for messages in rng.sample(written, len(written)):
            yield _with_system(rng, messages)
            if (function := next(functions, None)) is not None:
                yield _with_system(rng, _about_a_function(rng, function))
            if rng.random() < 0.3:
                yield _with_system(rng, _about_a_table(rng))


def parse_conversation(text: str) -> Messages:
    """A conversation whose user's turns are lines that begin with ``> ``.

    What stands between them are the assistant's turns.

    Raises:
        ValueError: it does not begin with the user, or a turn is empty.
    """
    messages: Messages = []
    for line in text.strip("\n").split("\n"):
        role = "user" if line == ">" or line.startswith("> ") else "assistant"
        line = line[2:] if role == "user" else line
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n{line}"
        else:
            messages.append({"role": role, "content": line})
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"expected turns of user and assistant, got {roles}: {text[:80]!r}")
    for message in messages:
        message["content"] = message["content"].strip("\n")
    return messages


def _joined(rng: random.Random, written: Sequence[Messages]) -> Iterator[Messages]:
    """Conversations of one to three written ones in a row."""
    rest = list(written)
    while rest:
        count = rng.choice((1, 1, 1, 2, 2, 3))
        yield [message for messages in rest[:count] for message in messages]
        rest = rest[count:]


def _with_system(rng: random.Random, messages: Messages) -> Messages:
    """A conversation, every other time behind a system's message."""
    if rng.random() < 0.5:
        return messages
    return [{"role": "system", "content": rng.choice(_SYSTEM)}, *messages]


@dataclass(frozen=True)
class _Function:
    """A documented function: its full name, source with and without docstring, docstring."""

    name: str
    source: str
    bare: str
    docstring: str


@cache
def _functions(module: str, text: str) -> tuple[_Function, ...]:
    """Public functions of a module, those of classes left out, that have a docstring."""
    lines = text.split("\n")
    functions = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        start = min([node.lineno, *(line.lineno for line in node.decorator_list)]) - 1
        source = "\n".join(lines[start : node.end_lineno])
        if not docstring or len(node.body) < 2 or len(source) > _LONGEST:
            continue
        first = node.body[0]
        without = lines[start : first.lineno - 1]
        without += lines[first.end_lineno : node.end_lineno]
        functions.append(_Function(f"{module}.{node.name}", source, "\n".join(without), docstring))
    return tuple(functions)


def _functions_in_turn(rng: random.Random, sources: Mapping[str, str]) -> Iterator[_Function]:
    """One function of each module after the other, without end if there is any.

    Modules are parsed when it is their turn: a few samples need few of them.
    """
    found = True
    while found:
        found = False
        rest: dict[str, list[_Function] | None] = dict.fromkeys(
            rng.sample(list(sources), len(sources))
        )
        while rest:
            for name, known in list(rest.items()):
                functions = known
                if functions is None:
                    parsed = _functions(name, sources[name])
                    functions = rest[name] = rng.sample(parsed, len(parsed))
                if functions:
                    found = True
                    yield functions.pop()
                else:
                    del rest[name]


def _about_a_function(rng: random.Random, function: _Function) -> Messages:
    first = function.docstring.split("\n\n")[0].replace("\n", " ")
    values = {
        "name": function.name,
        "function": function.name.rpartition(".")[2],
        "first": first,
        "bare": function.bare,
    }
    kind = rng.randrange(3)
    if kind == 0:
        question = rng.choice(_ASK_MEANING)
        head = function.bare.split(":\n")[0]
        answer = f"{function.docstring}\n\nIts signature is\n\n```python\n{head}: ...\n```"
    elif kind == 1:
        question = rng.choice(_ASK_SOURCE)
        answer = f"```python\n{function.source}\n```\n\n{first}"
    else:
        question, answer = rng.choice(_ASK_DOCSTRING), function.docstring
    return [
        {"role": "user", "content": question.format(**values)},
        {"role": "assistant", "content": answer},
    ]


def _about_a_table(rng: random.Random) -> Messages:
    """Rows to be shown in another form, with a question about them."""
    rows = [
        {
            "customer": rng.choice(_NAMES),
            "city": rng.choice(_CITIES),
            "product": rng.choice(_PRODUCTS),
            "quantity": rng.randint(1, 40),
            "price": rng.randint(100, 9900) / 100,
        }
        for _ in range(rng.randint(3, 7))
    ]
    forms = {"CSV": _csv, "JSON": _json, "a Markdown table": _markdown, "YAML": _yaml}
    (given, give), (wanted, want) = rng.sample(list(forms.items()), 2)
    most = max(rows, key=lambda row: int(str(row["quantity"])))
    total = sum(int(str(row["quantity"])) * float(str(row["price"])) for row in rows)
    messages = [
        {
            "role": "user",
            "content": f"Here are some orders as {given}. Turn them into {wanted}.\n\n{give(rows)}",
        },
        {"role": "assistant", "content": want(rows)},
    ]
    if rng.random() < 0.6:
        messages += [
            {"role": "user", "content": "Which order has the largest quantity, and what is the"
             " value of all orders together?"},
            {"role": "assistant", "content": (
                f"The largest quantity is {most['quantity']}, of the order of {most['product']} by"
                f" {most['customer']} in {most['city']}. All orders together are worth"
                f" {total:.2f}."
            )},
        ]  # fmt: skip
    return messages


Rows = Sequence[Mapping[str, object]]


def _csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return f"```csv\n{text.getvalue()}```"


def _json(rows: Rows) -> str:
    return f"```json\n{json.dumps([dict(row) for row in rows], indent=2)}\n```"


def _markdown(rows: Rows) -> str:
    lines: list[list[object]] = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [list(row.values()) for row in rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _yaml(rows: Rows) -> str:
    lines = [
        f"{'- ' if number == 0 else '  '}{key}: {value}"
        for row in rows
        for number, (key, value) in enumerate(row.items())
    ]
    return "```yaml\n" + "\n".join(lines) + "\n```"
