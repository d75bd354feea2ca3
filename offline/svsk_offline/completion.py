# SPDX-License-Identifier: Apache-2.0
"""What a shell offers for the value of an option that has few.

Where nothing fits what was typed, as for the path of a recipe file, shells offer files.
"""

from collections.abc import Callable, Iterable

__all__ = ["list_of", "one_of"]

Values = Iterable[str | int] | Callable[[], Iterable[str]]
"""Values, or a function that looks them up when they are asked for."""


def one_of(values: Values) -> Callable[[str], list[str]]:
    """Offers those that begin with what was typed."""
    return list_of(values, "")


def list_of(values: Values, separator: str = ",") -> Callable[[str], list[str]]:
    """Offers values for the last part of a list; nothing before an empty separator."""

    def complete(incomplete: str) -> list[str]:
        start = incomplete.rfind(separator) + 1 if separator else 0
        before, last = incomplete[:start], incomplete[start:]
        offered = map(str, values() if callable(values) else values)
        return [before + value for value in offered if value.startswith(last)]

    return complete
