# SPDX-License-Identifier: Apache-2.0
"""Errors of the checkpoint format."""

from svsk_kernels.errors import SvskError

__all__ = ["SvskError", "SvskFormatError"]


class SvskFormatError(SvskError, ValueError):
    """A checkpoint, a tensor or a configuration does not follow the SVSK format.

    The message names the file, tensor or key, the value found, what was expected, and what to do
    about it.
    """
