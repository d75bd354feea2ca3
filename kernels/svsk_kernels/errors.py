# SPDX-License-Identifier: Apache-2.0
"""The root of the project's errors, and those of its ground floor."""

__all__ = ["KernelError", "SvskError", "one_line"]


class SvskError(Exception):
    """Something a user asked for cannot be done.

    The message says what, why, and what to do about it.
    """


class KernelError(SvskError, ValueError):
    """A tensor, a tile or a setting is not what the kernels take."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and runs of blanks, to be quoted in another."""
    return " ".join(str(error).split())
