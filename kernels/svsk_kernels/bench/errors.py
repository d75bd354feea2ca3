# SPDX-License-Identifier: Apache-2.0
"""Errors a user of the benchmark can do something about."""

__all__ = ["BenchError"]


class BenchError(ValueError):
    """The benchmark cannot run as asked; the message says what to change."""
