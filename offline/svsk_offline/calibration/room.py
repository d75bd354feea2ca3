# SPDX-License-Identifier: Apache-2.0
"""What may be held in memory at a time, and what was."""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from typing import Final

__all__ = ["UNLIMITED", "Room", "give_back", "keep_few_products", "peak_memory_gib"]


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


def give_back() -> None:
    """Return freed memory to the system, where the C library can be asked to.

    glibc keeps what was freed for the next allocations, which of matrices of other sizes have no
    use for it: of a mixture of experts the process grew with every block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_few_products() -> None:
    """Have oneDNN keep the code of few products, if torch has computed none yet.

    It compiles 16-bit products for each shape and keeps the last 1024, of which the experts of a
    layer, each with another number of tokens, fill all: 0.8 GB with 64 experts of 1024 inputs.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
