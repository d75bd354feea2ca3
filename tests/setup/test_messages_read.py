# SPDX-License-Identifier: Apache-2.0
"""Messages of errors that no test reads yet: the list is current, and made with care."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FILE = "svsk_vllm/format/files.py"
OTHER = "eval/svsk_eval/text/models.py"
MESSAGES = [
    (FILE, "<path>: not valid JSON (<error>). Copy or write the file again."),
    (FILE, "<path>: holds a <name>, expected a JSON object."),
    (FILE, "Codes span <codes> to <codes>: expected <...> to <half>."),
    (FILE, "Recipe <path>: no such file. Shipped recipes: <names>."),
    (OTHER, "Text <path>: no such file."),
    (FILE, "<path>: cannot be opened here."),
    (OTHER, "<path>: cannot be opened here."),
]


@pytest.fixture(scope="module")
def messages_read() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / ".ci")
        yield importlib.import_module("messages_read")
    for name in ("messages_read", "messages_page"):
        sys.modules.pop(name, None)


def test_the_list_is_current(messages_read: ModuleType) -> None:
    """A new message has a test that reads it, and one that is read now leaves the list."""
    listed = messages_read.LIST.read_text(encoding="utf-8").splitlines()
    now = messages_read.list_text(messages_read.unread_now()).splitlines()
    new, read = sorted(set(now) - set(listed)), sorted(set(listed) - set(now))
    assert not new, "add a test that reads these"
    assert not read, "no longer unread: python .ci/messages_read.py --write"
    assert now == listed, "in another order: python .ci/messages_read.py --write"


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("raises(E, match=r'c\\.json: not valid JSON \\(.*Copy or write')", {0}),
        ("raises(E, match='[Cc]: not valid JSON|holds a list, expected a JSON')", {0, 1}),
        ("assert 'c.json: holds a list, expected a JSON object' in str(error)", {1}),
        ("assert f'{path}: holds a {kind}, expected a JSON' in str(error)", {1}),
        ("raises(E, match='not a JSON')", set()),
        ("raises(E, match='holds a list, expected one')", set()),
        ("raises(E, match='Codes span -9 to 7: expected -8 to 7')", {2}),
        ("raises(E, match='Codes span -9 to 7')", set()),  # all words of such a message
        ("raises(E, match='no such file')", set()),  # which of the two?
        ("raises(E, match='Text a.txt: no such file')", {4}),
        ("raises(E, match='no such file. Shipped')", {3}),
        ("raises(E, match='a: cannot be opened here')", {5}),  # the test is of this folder
        ("raise E('c.json: not valid JSON (x)')", set()),
        ("assert 'not valid JSON (x)' not in text", set()),
        ("assert text, 'c.json: not valid JSON (x)'", set()),
        ("def test():\n    '''c.json: not valid JSON (x)'''", set()),
    ],
)
def test_a_message_is_read_by_its_own_words(
    messages_read: ModuleType, source: str, read: set[int]
) -> None:
    unread = messages_read.unread(MESSAGES, {"tests/format/test_x.py": ast.parse(source)})
    assert {MESSAGES.index(message) for message in MESSAGES if message not in unread} == read
