# SPDX-License-Identifier: Apache-2.0
"""Shared memory of one block, with a shadow that knows who touched each byte and when.

What is an error:

- an access outside of what the launch asked for, or off its alignment;
- reading a byte that nobody wrote;
- two accesses of one byte by different threads, one of them a write that changes it, with no
  ``bar.sync`` between them. Threads of one warp are different threads too: PTX does not run them in
  lockstep. For them a ``bar.warp.sync`` does as well; a ``.sync`` instruction that only exchanges
  registers (``shfl``, ``mma``) orders no memory;
- touching what a ``cp.async`` is still to write, or writing what a ``wgmma`` still reads;
- a ``wgmma`` reading what was written without ``fence.proxy.async``, by its writer after the write,
  or by all threads of the reading warp group. PTX asks for one after ``cp.async`` too, but Triton
  3.6 (not 3.9) leaves it out: where only that one is missing it is a remark, not an error.

A write that leaves a byte as it was is no conflict: Triton has threads that hold the same value all
write it.
"""

from typing import Any, Final

import numpy as np

from svsk_kernel_tools.emulator.alu import Array
from svsk_kernel_tools.emulator.errors import MemoryFaultError, RaceError
from svsk_kernel_tools.emulator.parse import SHARED_BASE

__all__ = ["SharedMemory"]

# A record is epoch << 32 | phase of the warp << 12 | owner: a thread, a whole warp, or several
# warps.
_WARP: Final = 1024
_ANYONE: Final = 2047
_OWNER: Final = np.int64(0xFFF)
_PHASE: Final = np.int64(0xFFFFF)


class SharedMemory:
    """The bytes of one block. Addresses are of the shared window and begin at ``SHARED_BASE``.

    Args:
        size: bytes the launch asked for.
        threads: of the block.
        remarks: what was noticed that is no error, added to.
    """

    def __init__(self, size: int, threads: int, remarks: set[str]) -> None:
        room = -(-size // 16) * 16
        self.size, self.threads, self._remarks = size, threads, remarks
        self.data = np.zeros(room, np.uint8)
        self._writers, self._readers = np.zeros(room, np.int64), np.zeros(room, np.int64)
        self._written_at = np.zeros(room, np.int64)
        self._in_flight, self._copied = np.zeros(room, np.bool_), np.zeros(room, np.bool_)
        self._being_read = np.zeros(room, np.int16)
        self._flights, self._reads = 0, 0
        self._epoch, self._now = 1, 1
        self._phases = np.zeros(threads, np.int64)
        self._fences = np.zeros(threads, np.int64)

    @property
    def epoch(self) -> int:
        """How often all threads have met, counted from 1."""
        return self._epoch

    def barrier(self) -> None:
        """All threads have met."""
        self._epoch += 1

    def warp_barrier(self, threads: Array) -> None:
        """The threads of some whole warps have met, each warp by itself."""
        self._phases[threads] += 1

    def proxy_fence(self, threads: Array) -> None:
        """What these threads wrote or know to be written may be read by asynchronous operations."""
        self._now += 1
        self._fences[threads] = self._now

    def place(self, address: Array, total: int, threads: Array) -> Array:
        """Row of each address in memory taken as rows of ``total`` bytes."""
        offset = address.astype(np.int64) - SHARED_BASE
        bad = (offset < 0) | (offset + total > self.size)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            what = f"{total} bytes at byte {offset[first]} of shared memory"
            raise MemoryFaultError(f"thread {threads[first]}: {what}, which has {self.size}")
        rows: Array = offset // total
        if (rows * total != offset).any():
            first = int(np.flatnonzero(rows * total != offset)[0])
            what = f"{total} bytes at byte {offset[first]} of shared memory"
            raise MemoryFaultError(f"thread {threads[first]}: {what}, which is no multiple of them")
        return rows

    def load(self, address: Array, total: int, threads: Array, together: bool = False) -> Array:
        """Bytes [n, total]; ``together``: every byte is read for the whole warp of its thread."""
        rows = self.place(address, total, threads)
        owners = threads // 32 + _WARP if together else threads
        self._check_read(rows, total, threads, owners)
        return self.data.reshape(-1, total)[rows]

    def store(self, address: Array, values: Array, threads: Array, together: bool = False) -> None:
        """Write bytes [n, total]; ``together``: the bytes come from the whole warp."""
        total = values.shape[1]
        rows = self.place(address, total, threads)
        owners = threads // 32 + _WARP if together else threads
        data = self.data.reshape(-1, total)
        self._check_write(rows, total, threads, owners, data[rows] != values)
        data[rows] = values
        if (data[rows] != values).any():
            raise RaceError(
                "threads write different values to one byte of shared memory with one instruction"
            )
        self._stamp(rows, total, threads, owners)
        self._copied.reshape(-1, total)[rows] = False

    def begin_copy(self, address: Array, total: int, threads: Array) -> Array:
        """Check a ``cp.async`` as it is issued; its rows."""
        rows = self.place(address, total, threads)
        self._check_write(rows, total, threads, threads, np.ones((len(rows), total), np.bool_))
        self._in_flight.reshape(-1, total)[rows] = True
        self._flights += 1
        return rows

    def put_copy(self, rows: Array, values: Array) -> None:
        """Write what a ``cp.async`` copies."""
        self.data.reshape(-1, values.shape[1])[rows] = values

    def end_copy(self, rows: Array, total: int, threads: Array) -> None:
        """The threads have waited for their copies, which count as their own writes from now on."""
        self._in_flight.reshape(-1, total)[rows] = False
        self._stamp(rows, total, threads, threads)
        self._copied.reshape(-1, total)[rows] = True

    def copies_done(self) -> None:
        """One ``cp.async`` has landed for all its threads."""
        self._flights -= 1

    def begin_matrix(self, offsets: Array, threads: Array) -> None:
        """Check that these threads' ``wgmma`` may read bytes [n] until it is waited for."""
        bad = (offsets < 0) | (offsets >= self.size)
        if bad.any():
            raise MemoryFaultError(
                f"wgmma reads byte {offsets[bad][0]} of shared memory, which has {self.size}"
            )
        owners = np.full(len(offsets), _ANYONE)
        self._check_read(offsets, 1, np.full(len(offsets), threads[0]), owners, everyone=True)
        unfenced = offsets[self._written_at[offsets] >= self._fences[threads].min()]
        if len(unfenced):
            self._check_fences(unfenced)
        self._being_read[offsets] += 1
        self._reads += 1

    def _check_fences(self, offsets: Array) -> None:
        """Bytes that the readers have not fenced: their writers must have."""
        writers = self._writers[offsets] & _OWNER
        sole = np.where(writers < self.threads, writers, 0)
        missing = offsets[
            (writers >= self.threads) | (self._fences[sole] <= self._written_at[offsets])
        ]
        if self._copied[missing].all():
            self._remarks |= (
                {"wgmma reads what cp.async wrote without fence.proxy.async"}
                if len(missing)
                else set()
            )
            return
        byte = missing[~self._copied[missing]][0]
        raise RaceError(
            f"wgmma reads byte {byte} of shared memory, written without fence.proxy.async"
        )

    def end_matrix(self, offsets: Array) -> None:
        """That ``wgmma`` was waited for; it may have read as late as this."""
        self._being_read[offsets] -= 1
        self._reads -= 1
        self._readers[offsets] = np.int64(self._epoch << 32 | _ANYONE)

    def _record(self, threads: Array, owners: Array) -> Array:
        return (np.int64(self._epoch << 32) | (self._phases[threads] << 12) | owners)[:, None]

    def _stamp(self, rows: Array, total: int, threads: Array, owners: Array) -> None:
        self._now += 1
        self._writers.reshape(-1, total)[rows] = self._record(threads, owners)
        self._written_at.reshape(-1, total)[rows] = self._now

    def _unordered(self, records: Array, threads: Array, owners: Array) -> Array:
        """Which records [n, total] are of others since the last barrier that orders them."""
        owner = records & _OWNER
        _, passed = self._same_warp(records, threads)
        same_owner = (owner == owners[:, None]) & (owner < _WARP)
        result: Array = (records >> 32 == self._epoch) & ~same_owner & ~passed
        return result

    def _same_warp(self, records: Array, threads: Array) -> tuple[Array, Array]:
        """Which records [n, total] are of the threads' warps, and which a barrier orders."""
        owner = records & _OWNER
        warp = np.where(owner >= _WARP, owner - _WARP, owner // 32)
        same = (warp == (threads // 32)[:, None]) & (owner != _ANYONE)
        return same, same & ((records >> 12 & _PHASE) < self._phases[threads][:, None])

    def _check_read(
        self, rows: Array, total: int, threads: Array, owners: Array, everyone: bool = False
    ) -> None:
        writers = self._writers.reshape(-1, total)[rows]
        self._check_flights(rows, total, threads, "reads")
        if not writers.all():
            where = np.argwhere(writers == 0)[0]
            raise MemoryFaultError(
                f"thread {threads[where[0]]} reads byte {rows[where[0]] * total + where[1]} of"
                " shared memory, which nobody wrote"
            )
        fresh = writers >= np.int64(self._epoch << 32)
        if fresh.any():
            bad = fresh if everyone else self._unordered(writers, threads, owners)
            if bad.any():
                self._fail(bad, rows, threads, "reads", self._who(writers[bad][0], "wrote"))
        readers = self._readers.reshape(-1, total)
        old = readers[rows]
        mine = self._record(threads, owners)
        readers[rows] = mine
        if (old >= np.int64(self._epoch << 32)).any():
            self._merge(readers, rows, threads, old, mine)
        now = readers[rows]
        if (now != mine).any():  # several threads read a byte with this instruction
            self._merge(readers, rows, threads, now, np.broadcast_to(mine, now.shape))

    def _merge(
        self, readers: Array, rows: Array, threads: Array, other: Array, mine: Array
    ) -> None:
        """Records of bytes that ``other`` read as well since the last barrier."""
        mine = np.broadcast_to(mine, other.shape)
        warp = (threads // 32)[:, None]
        same_warp, ordered = self._same_warp(other, threads)
        recent = other >= np.int64(self._epoch << 32)
        both = recent & (other != mine) & ~ordered
        shared = (mine & ~_OWNER) | np.where(same_warp, warp + _WARP, _ANYONE)
        place = np.nonzero(both)
        readers[rows[place[0]], place[1]] = shared[place]
        again = readers[rows]
        others = ~self._same_warp(again, threads)[0] & (again >= np.int64(self._epoch << 32))
        place = np.nonzero(others)
        readers[rows[place[0]], place[1]] = np.int64(self._epoch << 32 | _ANYONE)

    def _check_write(
        self, rows: Array, total: int, threads: Array, owners: Array, changes: Array
    ) -> None:
        self._check_flights(rows, total, threads, "writes")
        if self._reads:
            reading = self._being_read.reshape(-1, total)[rows] > 0
            self._fail(reading, rows, threads, "writes", "a wgmma still reads")
        start = np.int64(self._epoch << 32)
        for records, verb in ((self._writers, "wrote"), (self._readers, "read")):
            found = records.reshape(-1, total)[rows]
            if (found >= start).any():
                bad = self._unordered(found, threads, owners) & changes
                if bad.any():
                    self._fail(bad, rows, threads, "writes", self._who(found[bad][0], verb))

    def _who(self, record: Any, verb: str) -> str:
        owner = int(record & _OWNER)
        if owner == _ANYONE:
            name = "threads of several warps"
        else:
            name = f"warp {owner - _WARP}" if owner >= _WARP else f"thread {owner}"
        return f"{name} {verb} since the last barrier"

    def _check_flights(self, rows: Array, total: int, threads: Array, verb: str) -> None:
        if self._flights:
            flying = self._in_flight.reshape(-1, total)[rows]
            self._fail(flying, rows, threads, verb, "a cp.async still writes")

    def _fail(self, bad: Array, rows: Array, threads: Array, verb: str, what: str) -> None:
        """Raise RaceError for the first of the bytes [n, bytes] that are bad, if any is."""
        if not bad.any():
            return
        where = np.argwhere(bad)[0]
        byte = int(rows[where[0]]) * bad.shape[1] + int(where[1])
        raise RaceError(
            f"thread {threads[where[0]]} {verb} byte {byte} of shared memory, which {what}"
        )
