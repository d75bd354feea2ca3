# SPDX-License-Identifier: Apache-2.0
"""Global memory.

The memory of the tensors given to a launch, at its real addresses, and nothing else.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from svsk_kernel_tools.emulator.alu import Array
from svsk_kernel_tools.emulator.errors import MemoryFaultError
from svsk_kernel_tools.emulator.ordering import Clocks, Visitor

__all__ = ["GlobalMemory", "Region", "regions_of"]

_BLOCK: Final = 16  # widest access; memory is mapped in whole blocks, which never cross a page


@dataclass
class Region:
    """Bytes from ``start`` up to ``stop`` that belong to some arguments."""

    names: tuple[str, ...]
    start: int
    stop: int
    bytes_read: int = 0
    bytes_written: int = 0
    origin: int = 0
    # per byte from ``origin``, who wrote it in this launch: see ``ordering``
    writers: Array | None = None
    _bytes: Array = field(default_factory=lambda: np.empty(0, np.uint8))

    def __post_init__(self) -> None:
        self.origin = self.start // _BLOCK * _BLOCK
        size = -(-self.stop // _BLOCK) * _BLOCK - self.origin
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.origin))

    def rows(self, total: int) -> Array:
        """The memory as rows of ``total`` bytes, counted from ``origin``."""
        return self._bytes.reshape(-1, total)

    def check(
        self,
        rows: Array,
        total: int,
        threads: Array,
        visitor: Visitor,
        changes: Array | None = None,
    ) -> None:
        """Raise RaceError if what is accessed was written by others, and nothing orders it.

        ``changes``: by writing.
        """
        if self.writers is not None:
            records = self.writers.reshape(-1, total)[rows]
            if records.any():
                records = records if changes is None else np.where(changes, records, 0)
                visitor.check(records, threads, "reads" if changes is None else "writes")

    def stamp(self, rows: Array, total: int, threads: Array, visitor: Visitor) -> None:
        """Remember who wrote."""
        if self.writers is None:
            self.writers = np.zeros(len(self._bytes), np.int64)
        self.writers.reshape(-1, total)[rows] = visitor.record(threads)[:, None]

    @property
    def name(self) -> str:
        """Names of the arguments."""
        return " and ".join(self.names)


def regions_of(arguments: Iterable[tuple[str, Any]]) -> list[Region]:
    """Memory that tensors among named arguments reach, from the first element to the last.

    Overlapping ones are one.

    Raises:
        MemoryFaultError: a tensor does not lie in CPU memory.
    """
    found: list[tuple[int, int, str]] = []
    for name, value in arguments:
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            continue
        if value.device.type != "cpu":
            raise MemoryFaultError(
                f"argument {name} lies on {value.device}: emulated kernels take CPU tensors."
            )
        last = sum(
            (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
        )
        found.append((value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size(), name))
    regions: list[Region] = []
    for start, stop, name in sorted(found):
        if regions and start < regions[-1].stop:
            before = regions.pop()
            names = before.names if name in before.names else (*before.names, name)
            regions.append(Region(names, before.start, max(stop, before.stop)))
        else:
            regions.append(Region((name,), start, stop))
    return regions


class GlobalMemory:
    """What one launch may touch.

    Args:
        regions: disjoint, by rising address.
    """

    def __init__(self, regions: list[Region]) -> None:
        self.regions, self.clocks = regions, Clocks()
        self.visitor: Visitor | None = None  # the block at work

    def load(self, address: Array, total: int, threads: Array) -> Array:
        """Bytes [n, total] at the addresses, which are multiples of ``total``."""
        values = np.empty((len(address), total), np.uint8)
        for region, chosen in self._spread(address, total, threads, "reads"):
            region.bytes_read += len(address[chosen]) * total
            rows = self._index(region, address[chosen], total, threads[chosen])
            if self.visitor is not None:
                region.check(rows, total, threads[chosen], self.visitor)
            if isinstance(chosen, slice):
                return region.rows(total)[rows]
            values[chosen] = region.rows(total)[rows]
        return values

    def store(self, address: Array, values: Array, threads: Array) -> None:
        """Write bytes [n, total]; of threads that write to one address the last wins."""
        total = values.shape[1]
        for region, chosen in self._spread(address, total, threads, "writes"):
            region.bytes_written += values[chosen].size
            rows = self._index(region, address[chosen], total, threads[chosen])
            memory = region.rows(total)
            if self.visitor is not None:
                region.check(
                    rows, total, threads[chosen], self.visitor, memory[rows] != values[chosen]
                )
                region.stamp(rows, total, threads[chosen], self.visitor)
            memory[rows] = values[chosen]

    @contextmanager
    def atomically(self) -> Iterator[None]:
        """Accesses inside are those of atomics, which need no order."""
        visitor, self.visitor = self.visitor, None
        try:
            yield
        finally:
            self.visitor = visitor

    def _index(self, region: Region, address: Array, total: int, threads: Array) -> Array:
        offset = address - np.uint64(region.origin)
        rows = offset // np.uint64(total)
        crooked = rows * np.uint64(total) != offset
        if crooked.any():
            first = int(np.flatnonzero(crooked)[0])
            raise MemoryFaultError(
                f"thread {threads[first]}: {total} bytes at {int(address[first]):#x}, which is no"
                f" multiple of them, byte {int(address[first]) - region.start} of {region.name}"
            )
        return rows.astype(np.int64)

    def _spread(
        self, address: Array, total: int, threads: Array, verb: str
    ) -> list[tuple[Region, Any]]:
        """Which accesses go to which region."""
        low, high = int(address.min()), int(address.max())
        for region in self.regions:
            if region.start <= low and high + total <= region.stop:
                return [(region, slice(None))]
        found: list[tuple[Region, Any]] = []
        left = np.ones(len(address), np.bool_)
        for region in self.regions:
            inside = (address >= np.uint64(region.start)) & (
                address + np.uint64(total) <= np.uint64(region.stop)
            )
            if inside.any():
                found.append((region, np.flatnonzero(inside)))
                left &= ~inside
        if left.any():
            first = int(np.flatnonzero(left)[0])
            where = self._describe(int(address[first]), total)
            raise MemoryFaultError(
                f"thread {threads[first]} {verb} {total} bytes at {int(address[first]):#x}, {where}"
            )
        return found

    def _describe(self, address: int, total: int) -> str:
        if not self.regions:
            return "and the launch has no tensors"

        def distance(region: Region) -> int:
            return max(region.start - address, address + total - region.stop)

        near = min(self.regions, key=distance)
        side = (
            f"{near.start - address} bytes before"
            if address < near.start
            else f"{address - near.start} bytes into"
        )
        return f"{side} the {near.stop - near.start} bytes of {near.name}, the nearest argument"
