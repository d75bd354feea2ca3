# SPDX-License-Identifier: Apache-2.0
"""Errors a user of the benchmark can do something about."""

from svsk_kernels.errors import SvskError

__all__ = ["BenchError"]


class BenchError(SvskError, ValueError):
    """The benchmark cannot run as asked; the message says what to change."""
