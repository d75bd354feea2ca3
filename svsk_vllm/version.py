# SPDX-License-Identifier: Apache-2.0
"""Version of the distribution, and of the checkpoint format it reads and writes."""

from typing import Final

__version__: Final = "0.1.0"

FORMAT_VERSION: Final = "1.0"
"""Version of a checkpoint that uses nothing newer, ``major.minor``.

A config group says which newer one it needs (``ConfigGroup.version``). A reader accepts every minor
version of a major one it knows.
"""
