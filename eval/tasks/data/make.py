# SPDX-License-Identifier: Apache-2.0
"""Make the generated data of the smoke tasks.

``python eval/tasks/data/make.py`` writes the files beside this one.

Every version of Python makes the same bytes: only ``random.Random(seed).random`` is drawn from,
whose stream Python guarantees. facts.jsonl is not made here: it was written by hand, as was
snippets.json, from which python.jsonl begins: a snippet, its right continuation, three wrong ones.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from svsk_offline.storage.atomic import write_text

__all__ = ["FOLDER", "generated"]

FOLDER: Final = Path(__file__).resolve().parent

T = TypeVar("T")
Item = Mapping[str, Any]

_ITEMS: Final = 100

_WORDS: Final = (
    "apple",
    "bread",
    "chair",
    "cloud",
    "dream",
    "eagle",
    "field",
    "glass",
    "heart",
    "island",
    "jacket",
    "kettle",
    "lemon",
    "marble",
    "needle",
    "ocean",
    "paper",
    "queen",
    "river",
    "stone",
    "table",
    "uncle",
    "valley",
    "window",
    "yellow",
    "zebra",
    "garden",
    "bottle",
    "candle",
    "forest",
    "hammer",
    "ladder",
    "mirror",
    "pencil",
    "rocket",
    "silver",
)

_NAMES: Final = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Nick",
    "Olga",
    "Peter",
)

_SYLLABLES: Final = (
    "ba",
    "do",
    "fi",
    "ga",
    "ki",
    "lu",
    "mo",
    "ne",
    "po",
    "ra",
    "su",
    "ti",
    "vo",
    "we",
    "za",
    "ju",
)


class _Draw:
    """Random choices made from ``random()`` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        return int(self._random() * limit)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def one(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different ones in random order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


def generated() -> dict[str, str]:
    """The text of every generated file by its name."""
    made = {"python": _python(), "arithmetic": _arithmetic(), "copy": _copy()}
    return {
        f"{name}.jsonl": "".join(json.dumps(item) + "\n" for item in items)
        for name, items in made.items()
    }


def _with_positions(draw: _Draw, items: Sequence[tuple[str, str, Sequence[str]]]) -> list[Item]:
    """Put right answers at each of four positions equally often, in no pattern."""
    positions = draw.some([index % 4 for index in range(len(items))], len(items))
    found: list[Item] = []
    for (question, right, wrong), position in zip(items, positions, strict=True):
        choices = [*wrong[:position], right, *wrong[position:]]
        found.append({"question": question, "choices": choices, "answer": position})
    return found


def _python() -> list[Item]:
    draw = _Draw(1)
    items: list[tuple[str, str, Sequence[str]]] = [
        (text, right, wrong)
        for text, right, *wrong in json.loads((FOLDER / "snippets.json").read_text("ascii"))
    ]
    seen = set()
    while len(items) < _ITEMS:
        question, right, wrong = _EXPRESSIONS[len(items) % len(_EXPRESSIONS)](draw)
        if question not in seen and len({right, *wrong}) == 4:
            seen.add(question)
            items.append((question, right, wrong))
    return _with_positions(draw, items)


def _asserted(
    expression: str, right: object, wrong: Sequence[object]
) -> tuple[str, str, list[str]]:
    return f"assert {expression} ==", repr(right), [repr(value) for value in wrong]


def _length(draw: _Draw) -> tuple[str, str, list[str]]:
    words = draw.some(_WORDS, draw.between(2, 5))
    return _asserted(
        f"len({words!r})", len(words), [value for value in (2, 3, 4, 5) if value != len(words)]
    )


def _element(draw: _Draw) -> tuple[str, str, list[str]]:
    words = draw.some(_WORDS, 4)
    index = draw.one((0, 1, 2, -1))
    return _asserted(
        f"{words!r}[{index}]", words[index], [word for word in words if word != words[index]]
    )


def _method(draw: _Draw) -> tuple[str, str, list[str]]:
    word = draw.one(_WORDS)
    forms = {
        "upper": word.upper(),
        "capitalize": word.capitalize(),
        "lower": word,
        "swapcase": word.upper(),
    }
    name = draw.one(("upper", "capitalize", "lower"))
    others = dict.fromkeys([*forms.values(), word[::-1], word + word])
    given = f"{word.title()!r}" if name == "lower" else f"{word!r}"
    return _asserted(
        f"{given}.{name}()", forms[name], [form for form in others if form != forms[name]][:3]
    )


def _sum_of_list(draw: _Draw) -> tuple[str, str, list[str]]:
    values = [draw.between(1, 9) for _ in range(3)]
    right = sum(values)
    return _asserted(f"sum({values!r})", right, [right + 1, right - 2, right + 10])


def _extreme(draw: _Draw) -> tuple[str, str, list[str]]:
    values = draw.some(range(10, 100), 4)
    name, function = draw.one((("max", max), ("min", min)))
    right = function(values)
    return _asserted(f"{name}({values!r})", right, [value for value in values if value != right])


def _lookup(draw: _Draw) -> tuple[str, str, list[str]]:
    names, values = draw.some(_NAMES, 4), draw.some(range(10, 100), 4)
    index = draw.below(4)
    table = dict(zip(names, values, strict=True))
    return _asserted(
        f"{table!r}[{names[index]!r}]",
        values[index],
        [value for value in values if value != values[index]],
    )


_EXPRESSIONS: Final = (_length, _element, _method, _sum_of_list, _extreme, _lookup)


def _arithmetic() -> list[Item]:
    draw = _Draw(2)
    found: dict[str, int] = {}
    while len(found) < _ITEMS:
        kind = len(found) % 4
        if kind == 0:
            a, b = draw.between(2, 9), draw.between(2, 9)
            found[f"{a} * {b}"] = a * b
        elif kind == 1:
            a, b = draw.between(3, 9), draw.between(3, 9)
            found[f"{a} + {b}"] = a + b
        elif kind == 2:
            a, b = draw.between(10, 49), draw.between(10, 49)
            found[f"{a} + {b}"] = a + b
        else:
            b = draw.between(2, 9)
            a = b + draw.between(1, 9)
            found[f"{a} - {b}"] = a - b
    return [{"question": question, "answer": str(answer)} for question, answer in found.items()]


def _copy() -> list[Item]:
    draw = _Draw(3)
    return [_COPIES[index % len(_COPIES)](draw) for index in range(_ITEMS)]


def _number_of_key(draw: _Draw) -> Item:
    """Eight keys with numbers of four digits; one is asked for."""
    keys = draw.some(_WORDS, 8)
    values = [str(value) for value in draw.some(range(1000, 10000), 8)]
    index = draw.below(8)
    table = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    return {"question": f"{table}\n\n{keys[index]}:", "answer": values[index]}


def _home_of_name(draw: _Draw) -> Item:
    """Five sentences; the object of one is asked for."""
    names, things = draw.some(_NAMES, 5), draw.some(_WORDS, 5)
    index = draw.below(5)
    told = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    return {"question": f"{told}\n\n{names[index]} has the", "answer": f"{things[index]}."}


def _rest_of_list(draw: _Draw) -> Item:
    """A list of seven words and its first two again; the rest is asked for."""
    words = draw.some(_WORDS, 7)
    return {
        "question": f"{', '.join(words)}\n{', '.join(words[:2])},",
        "answer": ", ".join(words[2:]),
    }


def _made_up_words(draw: _Draw) -> Item:
    """Five solved examples of exchanging two made-up words, then a sixth."""
    shown = []
    for _ in range(6):
        words = ["".join(draw.some(_SYLLABLES, 3)) for _ in range(2)]
        shown.append((f"{words[0]} {words[1]} ->", f"{words[1]} {words[0]}"))
    told = "\n".join(f"{left} {right}" for left, right in shown[:-1])
    return {"question": f"{told}\n{shown[-1][0]}", "answer": shown[-1][1]}


_COPIES: Final = (_number_of_key, _home_of_name, _rest_of_list, _made_up_words)


if __name__ == "__main__":
    for file_name, content in generated().items():
        write_text(FOLDER / file_name, content)
