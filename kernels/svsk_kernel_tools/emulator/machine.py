# SPDX-License-Identifier: Apache-2.0
"""Launches: the order of a grid's blocks, and kernels that may overlap."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

import numpy as np

from svsk_kernel_tools.emulator.cta import Cta, Work

__all__ = ["ORDERS", "Gpu", "Launch", "Order"]

Order = Literal["forward", "backward", "shuffled", "interleaved"]
"""Of a grid's blocks.

Interleaved: several are alive, and any of them goes on at barriers and atomics.
"""

ORDERS: Final[tuple[Order, ...]] = ("forward", "backward", "shuffled", "interleaved")

_ALIVE: Final = 6
"""Blocks alive at a time when they are interleaved."""


@dataclass(frozen=True)
class Launch:
    """What one launch did.

    Attributes:
        kernel: its name.
        grid: blocks along x, y and z.
        threads: of a block.
        instructions: executed, per opcode; counted once per warp, whatever threads of it were
            active.
        bytes_read: from global memory, per tensor argument. Tensors that share memory are one: "x
            and y".
        bytes_written: to it, likewise.
        overlapped: whether the kernel began before the one launched before it had ended.
        remarks: what was noticed that is no error.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    instructions: Mapping[str, int]
    bytes_read: Mapping[str, int]
    bytes_written: Mapping[str, int]
    overlapped: bool
    remarks: frozenset[str]

    @classmethod
    def of(cls, work: Work) -> "Launch":
        """What a launch did so far."""
        counts: Counter[str] = Counter()
        for runs, block in zip(work.runs, work.code.blocks, strict=True):
            for opcode, count in block.opcodes.items():
                counts[opcode] += runs * count
        regions = work.memory.regions
        return cls(
            kernel=work.code.program.name,
            grid=work.grid,
            threads=work.code.program.threads,
            instructions=+counts,
            bytes_read={region.name: region.bytes_read for region in regions},
            bytes_written={region.name: region.bytes_written for region in regions},
            overlapped=work.overlapped,
            remarks=frozenset(work.remarks),
        )


class Gpu:
    """A GPU that is not there.

    Args:
        capability: 80, 86, 89, 90 or 120.
        order: of the blocks of a grid.
        seed: of the orders that are random.
        late: asynchronous copies and matrix products happen only when they are waited for, instead
            of at once.
    """

    def __init__(self, capability: int, order: Order, seed: int, late: bool) -> None:
        self.capability, self.order, self.late = capability, order, late
        self.launches: list[Launch] = []
        self._random = random.Random(seed)
        self._held: Work | None = None

    def submit(self, work: Work, dependent: bool) -> None:
        """Run a launch, or hold it back.

        A kernel that lets the next one begin early runs when that one waits for it.

        Args:
            work: the launch.
            dependent: it was launched with programmatic dependent launch: all its blocks run up to
                ``griddepcontrol.wait`` as if nothing of the kernel before had happened.
        """
        opcodes = work.code.program.opcodes
        if dependent and self._held is not None:
            work.overlapped = True
            suspended = self._advance(self._blocks(work), stop=True)
            self.flush()
            self._finish(work, suspended)
            return
        self.flush()
        if "griddepcontrol.launch_dependents" in opcodes:
            self._held = work
        else:
            self._finish(work, self._blocks(work))

    def flush(self) -> None:
        """Run what is held back."""
        held, self._held = self._held, None
        if held is not None:
            self._finish(held, self._blocks(held))

    def drop(self) -> None:
        """Forget what is held back."""
        self._held = None

    def _finish(self, work: Work, blocks: list[Iterator[str]]) -> None:
        self._advance(blocks, stop=False)
        self.launches.append(Launch.of(work))

    def _blocks(self, work: Work) -> list[Iterator[str]]:
        """The blocks in their order, none of them begun."""
        x, y, _ = work.grid
        numbers = list(range(math.prod(work.grid)))
        if self.order == "backward":
            numbers.reverse()
        elif self.order == "shuffled":
            self._random.shuffle(numbers)
        return [
            self._block(work, (number % x, number // x % y, number // (x * y)))
            for number in numbers
        ]

    def _block(self, work: Work, place: tuple[int, int, int]) -> Iterator[str]:
        yield from Cta(work, place, self.late).run()

    def _advance(self, blocks: list[Iterator[str]], *, stop: bool) -> list[Iterator[str]]:
        """Run blocks to their ends, or with ``stop`` to ``griddepcontrol.wait``.

        Those that have not ended.
        """
        stopped: list[Iterator[str]] = []
        alive: list[Iterator[str]] = []
        left = iter(blocks)
        count = _ALIVE if self.order == "interleaved" else 1
        with np.errstate(all="ignore"):
            while True:
                alive += islice(left, count - len(alive))
                if not alive:
                    return stopped
                index = self._random.randrange(len(alive)) if count > 1 else 0
                event = next(alive[index], "end")
                if event == "end" or (stop and event == "wait"):
                    block = alive.pop(index)
                    stopped += [block] if event == "wait" else []
