# SPDX-License-Identifier: Apache-2.0
"""One block of threads at work.

Threads that stand at the same instruction run it together, those at the lowest first, which brings
together again what a branch parted. Between two barriers the order among warps is fixed here and is
not on a GPU: what could depend on it is found by the checks of shared memory instead.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from svsk_kernel_tools.emulator.alu import Array, unsigned
from svsk_kernel_tools.emulator.asynchronous import BUSY, Copies, Products
from svsk_kernel_tools.emulator.code import Block, Code
from svsk_kernel_tools.emulator.errors import BarrierError, EmulateError, RaceError
from svsk_kernel_tools.emulator.memory import GlobalMemory, regions_of
from svsk_kernel_tools.emulator.ordering import Visitor
from svsk_kernel_tools.emulator.parse import Instruction, Register
from svsk_kernel_tools.emulator.shared import SharedMemory

__all__ = ["Cta", "Work"]


@dataclass
class Work:
    """One launch on its way.

    Attributes:
        code: the kernel.
        grid: blocks along x, y and z.
        params: values of the kernel's parameters.
        arguments: of the launch by name; they are kept alive.
        shared_bytes: of dynamic shared memory.
    """

    code: Code
    grid: tuple[int, int, int]
    params: list[int]
    arguments: list[tuple[str, Any]]
    shared_bytes: int
    overlapped: bool = False

    def __post_init__(self) -> None:
        self.memory = GlobalMemory(regions_of(self.arguments))
        self.runs = [0] * len(self.code.blocks)  # of each warp through each block of the code
        self.remarks: set[str] = set()  # what was noticed that is no error


class Cta:
    """State of one block.

    Args:
        work: the launch it belongs to; ``runs`` is counted up and ``remarks`` added to.
        place: %ctaid.
        late: asynchronous copies and products happen as late as they may, not as early.
    """

    def __init__(self, work: Work, place: tuple[int, int, int], late: bool) -> None:
        code, grid = work.code, work.grid
        self.code, self.place, self.memory, self.runs = code, place, work.memory, work.runs
        self.threads = code.program.threads
        self.everyone = np.arange(self.threads)
        self.shared = SharedMemory(work.shared_bytes, self.threads, work.remarks)
        x, y, z = place
        self._visitor = Visitor((z * grid[1] + y) * grid[0] + x, self.shared)
        self.copies, self.products = Copies(self, late), Products(self, late)
        self.r: list[Any] = [None] * len(code.slots.names)
        self._fill(grid, work.params)
        self._at = np.zeros(self.threads, np.int64)
        self._waiting = np.zeros(self.threads, np.bool_)
        self._alive = np.ones(self.threads, np.bool_)
        self._together: int | None = 0  # where all threads stand, if they do
        self._now: Instruction | None = None

    def _fill(self, grid: tuple[int, int, int], params: list[int]) -> None:
        slots = self.code.slots
        values: dict[str, Any] = {
            "%tid.x": self.everyone,
            "%tid.y": 0,
            "%tid.z": 0,
            "%laneid": self.everyone % 32,
        }
        values |= {"%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1}
        for axis, index, size in zip("xyz", self.place, grid, strict=True):
            values |= {f"%ctaid.{axis}": index, f"%nctaid.{axis}": size}
        for name, (index, _) in self.code.program.params.items():
            values[name] = params[index]
        for slot, value in slots.constants.items():
            self.r[slot] = np.full(self.threads, value, unsigned(slots.widths[slot]))
        for name, slot in slots.inputs.items():
            self.r[slot] = np.full(self.threads, values[name], unsigned(slots.widths[slot]))

    def lanes(self, mask: Array | None) -> Array:
        """Numbers of the threads of a mask."""
        return self.everyone if mask is None else np.flatnonzero(mask)

    def put(self, slot: int, value: Array, mask: Array | None) -> None:
        """Set a register for the threads of a mask.

        Where nothing was given yet, others get all ones (NaN, -1).
        """
        if mask is not None:
            old = self.r[slot]
            value = np.where(mask, value, ~np.zeros_like(value) if old is None else old)
        self.r[slot] = value

    def put_some(self, slot: int | None, values: Array, threads: Array) -> None:
        """Set a register for some threads.

        ``values`` has one each. Widths are fitted with zeros.
        """
        if slot is None:
            return
        dtype: Any = unsigned(self.code.slots.widths[slot])
        values = values.astype(dtype)
        if len(threads) < self.threads:
            old = self.r[slot]
            whole = ~np.zeros(self.threads, dtype) if old is None else old.copy()
            whole[threads] = values
            values = whole
        self.r[slot] = values

    def whole_warps(self, mask: Array | None) -> Array:
        """Numbers of the warps of a mask, which must have all their threads in it.

        Raises:
            BarrierError: they have not.
        """
        if mask is None:
            return self.everyone[: self.threads // 32]
        warps = mask.reshape(-1, 32)
        active = warps.any(axis=1)
        if (warps != self._alive.reshape(-1, 32))[active].any() or not warps[active].all():
            raise BarrierError(
                "only some threads of a warp are here, and the instruction is one of whole warps"
            )
        return np.flatnonzero(active)

    def run(self) -> Iterator[str]:
        """Run to the end.

        Yields where others may run: "atomic", "barrier", "wait" (griddepcontrol).
        """
        blocks = self.code.blocks
        while True:
            if self._together is not None:
                index, mask = self._together, None
            else:
                ready = self._alive & ~self._waiting
                if not ready.any():
                    return
                index = int(self._at[ready].min())
                mask = ready & (self._at == index)
            block = blocks[index]
            if block.pause:
                yield block.pause
            self.memory.visitor = self._visitor
            try:
                self._work(block, mask)
                met = self._leave(block, index, mask)
            except EmulateError as error:
                raise type(error)(f"{self._where()}: {error}") from error
            except (TypeError, AttributeError, IndexError) as error:
                raise self._explain(error) from error
            self.runs[index] += (
                self.threads // 32 if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
            )
            if met:
                yield "barrier"

    def _work(self, block: Block, mask: Array | None) -> None:
        r = self.r
        for step in block.steps:
            self._now = step.instruction
            if step.compute is None:
                step.effect(self, mask)  # type: ignore[misc]
            elif mask is None:
                r[step.target] = step.compute(r)
            else:
                self.put(step.target, step.compute(r), mask)

    def _leave(self, block: Block, index: int, mask: Array | None) -> bool:
        """Move the threads on; whether all have met at a barrier."""
        if block.last is not None:
            self._now = block.last
        if block.end == "return":
            return self._retire(mask)
        following: Any = index + 1
        if block.end == "branch":
            following = block.target
            if block.guard is not None:
                jumps = self.r[block.guard]
                if block.last is not None and block.last.negated:
                    jumps = ~jumps
                jumping = jumps if mask is None else jumps[mask]
                following = (
                    block.target if jumping.all() else np.where(jumps, block.target, index + 1)
                )
                following = following if jumping.any() else index + 1
        if block.end == "barrier":
            self.whole_warps(mask)
            if mask is None:
                self.shared.barrier()
                self._together = index + 1
                return True
            self._waiting |= mask
        if mask is None and isinstance(following, int):
            self._together = following
            return False
        if mask is None:
            self._at, self._together = following, None
        else:
            self._at = np.where(mask, following, self._at)
        return self._gather()

    def _gather(self) -> bool:
        """Release a barrier where all have arrived.

        See whether all threads stand together again.
        """
        met = bool(self._waiting.any() and self._waiting[self._alive].all())
        if met:
            self._waiting[:] = False
            self.shared.barrier()
        first = int(self._at[0])
        if self._alive.all() and not self._waiting.any() and (self._at == first).all():
            self._together = first
        return met

    def _retire(self, mask: Array | None) -> bool:
        if mask is None:
            self._alive[:] = False
        else:
            self._alive &= ~mask
        self._together = None
        return self._gather() if self._alive.any() else False

    def _where(self) -> str:
        now, place = self._now, ", ".join(map(str, self.place))
        name = self.code.program.name
        if now is None:
            return f"{name}, CTA ({place})"
        text = now.text if len(now.text) <= 120 else now.text[:117] + "..."
        return f"{name}: PTX line {now.line} ({now.source or 'no source'}), CTA ({place}): `{text}`"

    def _explain(self, error: Exception) -> Exception:
        """An instruction failed: because of what a register holds, or because of the emulator."""
        words = set() if self._now is None else set(re.findall(r"%?[\w$]+", self._now.text))
        named = [
            (name, value)
            for name, value in zip(self.code.slots.names, self.r, strict=True)
            if name.split("#")[0] in words
        ]
        busy = [name for name, value in named if value is BUSY]
        if busy:
            return RaceError(
                f"{self._where()}: {', '.join(busy)}: a wgmma that was not waited for writes it"
            )
        target = self._now.operands[0] if self._now is not None and self._now.operands else None
        written = target.name if isinstance(target, Register) else ""
        empty = [name for name, value in named if value is None and name != written]
        if empty:
            return EmulateError(f"{self._where()}: no instruction gave {', '.join(empty)} a value")
        return EmulateError(f"{self._where()}: the emulator failed: {error!r}")
