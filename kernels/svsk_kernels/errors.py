# SPDX-License-Identifier: Apache-2.0
"""The root of the project's errors, and those of its ground floor."""

__all__ = ["KernelError", "SvskError"]


class SvskError(Exception):
    """Something a user asked for cannot be done.

    The message says what, why, and what to do about it.
    """


class KernelError(SvskError, ValueError):
    """A tensor, a tile or a setting is not what the kernels take."""
