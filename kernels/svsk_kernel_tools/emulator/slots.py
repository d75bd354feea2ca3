# SPDX-License-Identifier: Apache-2.0
"""Numbers for what instructions name: registers, constants, parameters, special registers."""

import re
from collections.abc import Callable
from typing import Any, Final

from svsk_kernel_tools.emulator.alu import Array, Compute, Source, unsigned
from svsk_kernel_tools.emulator.errors import UnsupportedError
from svsk_kernel_tools.emulator.parse import Address, Operand, Program, Register, Vector

__all__ = ["Effect", "Slots"]

Effect = Callable[[Any, Array | None], None]
"""Executes an instruction on a block's state (``cta.Cta``) for a mask of threads, None for all."""

_SPECIAL: Final = re.compile(r"^%(tid\.[xyz]|ntid\.[xyz]|ctaid\.[xyz]|nctaid\.[xyz]|laneid)$")


class Slots:
    """Numbers of registers, constants, parameters and special registers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: list[str] = []
        self.widths: list[int] = []
        self.constants: dict[int, int] = {}
        # parameters and special registers, which the block fills in
        self.inputs: dict[str, int] = {}
        self._known: dict[Any, int] = {}

    def _slot(self, key: Any, name: str, width: int) -> int:
        if key not in self._known:
            self._known[key] = len(self.names)
            self.names.append(name)
            self.widths.append(width)
        return self._known[key]

    def register(self, register: Operand) -> int:
        """Number of a register."""
        if not isinstance(register, Register):
            raise UnsupportedError(f"expected a register, found {register!r}")
        return self._slot(register.name, register.name, register.width)

    def target(self, operand: Operand) -> int | None:
        """Number of a register that a result goes to; None for ``_``."""
        return None if operand is None else self.register(operand)

    def targets(self, operand: Operand) -> list[int | None]:
        """Those of a vector or of one register."""
        return [
            self.target(part)
            for part in (operand.parts if isinstance(operand, Vector) else (operand,))
        ]

    def constant(self, value: int, width: int) -> Source:
        """A constant, kept like a register."""
        value &= (1 << width) - 1
        slot = self._slot((value, width), str(value), width)
        self.constants[slot] = value
        return Source(slot, value)

    def input(self, name: str, width: int) -> int:
        """A parameter or a special register."""
        slot = self._slot(name, name, width)
        self.inputs[name] = slot
        return slot

    def source(self, operand: Operand, width: int) -> Source:
        """An operand that is read; ``width`` is that of immediate values."""
        if isinstance(operand, Register):
            return Source(self.register(operand))
        if isinstance(operand, int):
            return self.constant(operand, width)
        if isinstance(operand, str) and operand in self.program.symbols:
            return self.constant(self.program.symbols[operand], width)
        if isinstance(operand, str) and _SPECIAL.match(operand):
            return Source(self.input(operand, 32))
        raise UnsupportedError(f"operand {operand!r} is not supported")

    def address(self, operand: Operand, width: int) -> Compute:
        """What computes the address of a memory operand."""
        if not isinstance(operand, Address):
            raise UnsupportedError(f"expected an address, found {operand!r}")
        base = self.source(operand.base, width)
        if base.constant is not None:
            slot = self.constant(base.constant + operand.offset, width).slot
            return lambda r: r[slot]
        slot = base.slot
        if self.widths[slot] != width:
            raise UnsupportedError(f"an address of {self.widths[slot]} bits; {width} are supported")
        if not operand.offset:
            return lambda r: r[slot]
        offset = unsigned(width)(operand.offset & ((1 << width) - 1))
        return lambda r: r[slot] + offset
