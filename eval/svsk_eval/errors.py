# SPDX-License-Identifier: Apache-2.0
"""Errors of the evaluation package."""

from svsk_kernels.errors import SvskError

__all__ = ["DownloadError", "EvalError"]


class EvalError(SvskError, ValueError):
    """An evaluation cannot be run as asked.

    The message names the file or model, what was found, what was expected, and what to do about it.
    """


class DownloadError(EvalError):
    """Something an evaluation needs could not be fetched from a package index."""
