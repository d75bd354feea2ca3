# SPDX-License-Identifier: Apache-2.0
"""Which modules the targets and ignore entries of a config name.

They are matched as compressed-tensors matches them: a module name, a class name (``Linear``), or
``re:`` and a regular expression that must match from the start of the module name.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Final

from pydantic import AfterValidator

__all__ = ["LINEAR_CLASS", "Entries", "Target", "matches", "printable"]

LINEAR_CLASS: Final = "Linear"
_MAX_REPEATS: Final = 4


def printable(name: str) -> str:
    """A name as it is.

    Raises:
        ValueError: it holds what a terminal would obey.
    """
    if not name.isprintable():
        raise ValueError("expected printable characters only: a terminal would obey the others")
    return name


def _valid_pattern(entry: str) -> str:
    printable(entry)
    if entry.startswith("re:"):
        try:
            re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"not a valid regular expression ({error})") from error
        if re.search(r"\)[*+{]", entry) or len(re.findall(r"[*+{]", entry)) > _MAX_REPEATS:
            raise ValueError(
                f"a repeated group, or more than {_MAX_REPEATS}"
                " repeats: matching could take for ever"
            )
    return entry


Target = Annotated[str, AfterValidator(_valid_pattern)]


class Entries:
    """Targets or ignore entries, to be asked about one name after another.

    Args:
        entries: each with the key of what it belongs to.
    """

    def __init__(self, entries: Iterable[tuple[str, str]]) -> None:
        self._exact: dict[str, dict[str, None]] = {}
        self._patterns: dict[tuple[re.Pattern[str], str], None] = {}
        for entry, key in entries:
            if entry.startswith("re:"):
                self._patterns[re.compile(entry.removeprefix("re:")), key] = None
            else:
                self._exact.setdefault(entry, {})[key] = None

    def best(self, name: str, *, by_class: bool = True) -> list[str]:
        """Keys of the entries that match a name best, in order: see :func:`matches`.

        Args:
            name: of a linear module.
            by_class: whether the name of a class matches.
        """
        if name in self._exact:
            return list(self._exact[name])
        found = dict.fromkeys(key for pattern, key in self._patterns if pattern.match(name))
        if not found and by_class:
            found = self._exact.get(LINEAR_CLASS, {})
        return list(found)


def matches(name: str, entries: Iterable[str]) -> bool:
    """Whether one of the target or ignore entries matches the linear module ``name``.

    As ``compressed_tensors.utils.match.match_name``, whose import takes torch and transformers: an
    exact name, a regular expression from the start of the name, or the class of all linears.
    """
    return bool(Entries((entry, entry) for entry in entries).best(name))
