# SPDX-License-Identifier: Apache-2.0
"""The one exception of this package."""

from svsk_kernels.errors import SvskError

__all__ = ["InspectError"]


class InspectError(SvskError, RuntimeError):
    """A kernel could not be compiled, or its binary not be read.

    The message says what to do about it.
    """
