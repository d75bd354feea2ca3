# SPDX-License-Identifier: Apache-2.0
"""Errors of the checkpoint format."""

__all__ = ["SvskFormatError"]


class SvskFormatError(ValueError):
    """A checkpoint, a tensor or a configuration does not follow the SVSK format.

    The message names the file, tensor or key, the value found, what was expected, and what to do about it.
    """
