# SPDX-License-Identifier: Apache-2.0
"""Who may see what another thread wrote to global memory, within one launch.

A write is ordered before an access of another thread of its block by a ``bar.sync`` between them,
and before one of another block by a chain: the barrier (or the same thread), an atomic that
releases, an atomic on the same address that acquires, and again a barrier or the same thread.
Source: PTX ISA, "Memory Consistency Model", cut down to what is checked: reads of, and changes to,
bytes that this launch wrote. A write after an unordered read is not noticed.
"""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from svsk_kernel_tools.emulator.alu import Array
from svsk_kernel_tools.emulator.errors import RaceError

__all__ = ["Clocks", "Visitor"]

_THREAD: Final = np.int64(0xFFF)
_EPOCH: Final = np.int64((1 << 28) - 1)


@dataclass(frozen=True)
class _Known:
    """Let ``thread`` know a block's writes before barrier ``epoch`` and ``releaser``'s up to now.

    Other threads know them after their own block's barrier ``since``.
    """

    epoch: int
    releaser: int
    thread: int
    since: int


@dataclass
class Visitor:
    """One block as global memory knows it."""

    number: int
    shared: Any  # its shared memory, which counts its barriers
    known: dict[int, _Known] = field(default_factory=dict)

    def record(self, threads: Array) -> Array:
        """What stands for a write of these threads now; never zero."""
        return np.int64((self.number + 1) << 40 | self.shared.epoch << 12) | threads.astype(
            np.int64
        )

    def check(self, records: Array, threads: Array, verb: str) -> None:
        """Raise RaceError unless writes [n, bytes] are ordered before accesses of these threads."""
        mine = self.record(threads)[:, None]
        writer, epoch, thread = (records >> 40) - 1, records >> 12 & _EPOCH, records & _THREAD
        bad = (records >> 12 == mine >> 12) & (records != mine)
        foreign = (records != 0) & (writer != self.number)
        if foreign.any():
            for number in np.unique(writer[foreign]):
                known = self.known.get(int(number))
                theirs = foreign & (writer == number)
                if known is not None:
                    released = (epoch < known.epoch) | (
                        (epoch == known.epoch) & (thread == known.releaser)
                    )
                    acquired = (threads == known.thread) | (self.shared.epoch > known.since)
                    theirs &= ~(released & acquired[:, None])
                bad |= theirs
        if bad.any():
            row, column = np.argwhere(bad)[0]
            who = f"thread {thread[row, column]} of block {writer[row, column]}"
            what = f"global memory that {who} wrote in the same launch"
            raise RaceError(f"thread {threads[row]} {verb} {what}, and nothing orders them")


class Clocks:
    """What each address of an atomic has been told."""

    def __init__(self) -> None:
        self._told: dict[int, dict[int, tuple[int, int]]] = {}

    def visit(
        self, visitor: Visitor, address: int, thread: int, acquires: bool, releases: bool
    ) -> None:
        """An atomic of one thread."""
        told, now = self._told.setdefault(address, {}), visitor.shared.epoch
        before = dict(told)
        if releases:
            for number, known in visitor.known.items():
                if (known.thread == thread or now > known.since) and told.get(number, (0, 0))[
                    0
                ] < known.epoch:
                    told[number] = (known.epoch, known.releaser)
            told[visitor.number] = (now, thread)
        if acquires:
            for number, (epoch, releaser) in before.items():
                known_epoch = visitor.known[number].epoch if number in visitor.known else -1
                if number != visitor.number and known_epoch < epoch:
                    visitor.known[number] = _Known(epoch, releaser, thread, now)
