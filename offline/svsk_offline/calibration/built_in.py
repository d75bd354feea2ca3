# SPDX-License-Identifier: Apache-2.0
"""Text that needs no download: prose, code, conversations and arithmetic."""

import importlib.util
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from svsk_offline.calibration.arithmetic import word_problem
from svsk_offline.calibration.conversations import conversations
from svsk_offline.calibration.rows import RowReader

__all__ = ["built_in_documents"]

_PYTHON_MODULES: Final = tuple(
    """
    argparse ast asyncio.base_events collections csv dataclasses datetime decimal difflib
    email.message fractions heapq http.client inspect json.decoder logging pathlib pickle random
    shutil statistics subprocess tarfile textwrap threading typing unittest.mock urllib.parse
    zipfile
    """.split()  # noqa: SIM905 - a literal would take a line for each
)
"""Of the source ``python``."""

_MORE_MODULES: Final = tuple(
    """
    abc asyncio.locks asyncio.queues asyncio.streams asyncio.tasks base64 bisect calendar cmd
    codecs colorsys concurrent.futures.process concurrent.futures.thread configparser contextlib
    copy ctypes.util doctest enum filecmp fnmatch functools getpass gettext glob graphlib gzip
    hashlib hmac html.parser http.cookiejar http.cookies http.server importlib.metadata ipaddress
    json.encoder keyword linecache logging.config logging.handlers mimetypes
    multiprocessing.pool multiprocessing.queues netrc numbers operator os platform plistlib
    posixpath pprint profile pstats queue quopri reprlib rlcompleter sched secrets selectors shelve
    shlex smtplib socket socketserver sqlite3.dump ssl string symtable tempfile timeit tokenize
    trace traceback types unittest.case unittest.loader urllib.request urllib.robotparser uuid
    warnings wave weakref wsgiref.handlers xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils
    xmlrpc.client zipapp
    """.split()  # noqa: SIM905 - a literal would take a line for each
)
"""Of the source ``code``, besides those of ``python``; not those that ``make demo`` scores on."""

_SECTION: Final = 4000
"""Characters of prose or code that stand as a document, at least: most samples end within one."""

_DEFINITION: Final = re.compile(r"\n\n+(?= {0,8}(?:@|def |class |async def ))")
"""Before a function, a class or a method."""


def built_in_documents(name: str, rows: RowReader, seed: int) -> Iterator[str]:
    """The documents of a built-in text, in an order that the seed decides.

    Args:
        name: ``python`` (the same order always), ``prose``, ``code``, ``chat`` or ``arithmetic``.
            The last two never end.
        rows: renders conversations.
        seed: of the order, and of what is made up.
    """
    # A string, as the same numbers would follow from the same seed in all of them.
    rng = random.Random(f"{name} {seed}")
    if name == "python":
        yield from _standard_library()
    elif name == "prose":
        topics = [part for text in _topics() for part in _sections(text, r"\n\n+")]
        yield from _in_turn(rng, _shipped("prose.txt"), topics)
    elif name == "code":
        modules = [text for name in _PYTHON_MODULES + _MORE_MODULES for text in _module(name)]
        parts = [part for text in modules for part in _sections(text, _DEFINITION)]
        yield from _in_turn(rng, _shipped("code.txt"), parts)
    elif name == "chat":
        sources = {name: text for name in _PYTHON_MODULES + _MORE_MODULES for text in _module(name)}
        for messages in conversations(rng, _shipped("chat.txt"), sources):
            yield rows.conversation(messages, f"text {name}")
    else:
        yield from _arithmetic(rng, rows)


def _arithmetic(rng: random.Random, rows: RowReader) -> Iterator[str]:
    """Worked word problems: two in three as a conversation, the others as plain text."""
    while True:
        problem = word_problem(rng)
        if rng.random() < 1 / 3:
            yield f"Question: {problem.question}\nAnswer: {problem.answer}\n\n"
            continue
        messages = []
        for turn in (problem, *(word_problem(rng) for _ in range(rng.randint(0, 2)))):
            messages += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.answer},
            ]
        yield rows.conversation(messages, "text arithmetic")


def _in_turn(rng: random.Random, shipped: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    """Documents of this package and others in turn, each in random order, until all are out."""
    first, second = (rng.sample(texts, len(texts)) for texts in (list(shipped), list(others)))
    for index in range(max(len(first), len(second))):
        for texts in (first, second):
            if index < len(texts):
                yield texts[index].strip("\n") + "\n\n"


@cache
def _shipped(name: str) -> tuple[str, ...]:
    """The documents of a text of this package: what stands between lines of three dashes.

    The first one is the file's own note.
    """
    folder = resources.files("svsk_offline") / "calibration" / "texts"
    text = (folder / name).read_text(encoding="utf-8")
    return tuple(part.strip("\n") for part in text.split("\n---\n")[1:])


def _sections(text: str, border: str | re.Pattern[str]) -> Iterator[str]:
    """A text in documents of ``_SECTION`` characters or a little more, divided at a border."""
    section = ""
    for part in re.split(border, text):
        section = f"{section}\n\n{part}" if section else part
        if len(section) >= _SECTION:
            yield section
            section = ""
    if section:
        yield section


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]


@cache
def _module(name: str) -> tuple[str, ...]:
    """The source of a module of the standard library, where this Python has it."""
    try:
        module = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its package
        return ()
    if module is None or not (module.origin or "").endswith(".py"):
        return ()
    return (Path(str(module.origin)).read_text(encoding="utf-8"),)


def _standard_library() -> Iterator[str]:
    """Prose about Python, and code with docstrings, in turn: every part of the stream has both."""
    prose = _topics()
    sources = [text for name in _PYTHON_MODULES for text in _module(name)]
    step = -(-len(prose) // max(1, len(sources)))
    for index, code in enumerate(sources):
        yield "\n\n".join(prose[index * step : (index + 1) * step])
        yield code
