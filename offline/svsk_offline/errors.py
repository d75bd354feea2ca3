# SPDX-License-Identifier: Apache-2.0
"""Errors a user of the offline tool can mend."""

__all__ = ["SvskError"]


class SvskError(RuntimeError):
    """Something the user asked for cannot be done; the message says what, why, and what to do."""
