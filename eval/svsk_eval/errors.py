# SPDX-License-Identifier: Apache-2.0
"""Errors of the evaluation package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from svsk_kernels.errors import SvskError

if TYPE_CHECKING:  # the command's start does not wait for it
    from pydantic import ValidationError

__all__ = ["DownloadError", "EvalError", "first_problem", "packages_of_pages"]


class EvalError(SvskError, ValueError):
    """An evaluation cannot be run as asked.

    The message names the file or model, what was found, what was expected, and what to do about it.
    """


class DownloadError(EvalError):
    """Something an evaluation needs could not be fetched from a package index."""


def first_problem(error: "ValidationError") -> str:
    """Where a file first differs from what it should be, and how; for the end of a message."""
    from svsk_vllm.format.problems import problem_text

    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {problem_text(first)}"


@contextmanager
def packages_of_pages() -> Iterator[None]:
    """Import what writes HTML pages: its packages are optional, and may be absent.

    Raises:
        EvalError: one is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise EvalError(
            f"A report in HTML needs the package {package}, which is not installed:"
            " pip install 'svsk-vllm[eval]'."
        ) from error
