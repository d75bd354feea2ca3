# SPDX-License-Identifier: Apache-2.0
"""What may be held in memory at a time, and what was."""

import resource
import sys
from dataclasses import dataclass
from typing import Final

__all__ = ["UNLIMITED", "Room", "peak_memory_gib"]


@dataclass(frozen=True)
class Room:
    """Bytes that may be held at a time.

    Attributes:
        hidden: of one tensor of hidden states; a larger one goes to a temporary file.
        statistics: of second moments that are gathered of a block, those being worked on not
            counted; None for no limit. More are gathered in turns.
    """

    hidden: int
    statistics: int | None


UNLIMITED: Final = Room(hidden=2 << 30, statistics=None)
"""Without a memory budget. Hidden states above 2 GiB gain little from memory."""


def peak_memory_gib() -> float:
    """Largest resident size of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (1 << 30 if sys.platform == "darwin" else 1 << 20)
