# SPDX-License-Identifier: Apache-2.0
"""A parsed kernel made executable.

Numbered registers, one function per instruction, blocks between jumps.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np

from svsk_kernel_tools.emulator.alu import OPERATIONS, Array, Compute, Registers, unsigned
from svsk_kernel_tools.emulator.effects import effect_of
from svsk_kernel_tools.emulator.errors import UnsupportedError
from svsk_kernel_tools.emulator.parse import Address, Instruction, Program, Vector, parse
from svsk_kernel_tools.emulator.slots import Effect, Slots

__all__ = ["Block", "Code", "Step", "code_of"]

_WIDTH: Final = re.compile(r"(\d+)(x2)?$")
_TERMINATORS: Final = ("bra", "bra.uni", "ret", "bar.sync", "exit")
_PAUSES: Final = {"griddepcontrol.wait": "wait"}
_LOAD_TYPES: Final = {"s32": np.int32, "s16": np.int16, "s8": np.int8}


@dataclass(frozen=True)
class Step:
    """One instruction.

    ``compute`` gives the new value of register ``target``, or ``effect`` does everything.
    """

    instruction: Instruction
    target: int
    compute: Compute | None
    effect: Effect | None


@dataclass
class Block:
    """Instructions that all threads that enter it run through, and how it ends."""

    steps: list[Step] = field(default_factory=list)
    pause: str = ""  # what the scheduler is told before the block runs
    end: str = "next"  # "next", "branch", "barrier" or "return"
    last: Instruction | None = None
    target: int = -1
    guard: int | None = None
    opcodes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Code:
    """An executable kernel."""

    program: Program
    slots: Slots
    blocks: list[Block]


@lru_cache(maxsize=256)
def code_of(ptx: str) -> Code:
    """Executable form of a kernel's PTX.

    Raises:
        UnsupportedError: an instruction is not known; the message names its line.
    """
    program = parse(ptx)
    slots = Slots(program)
    starts = _starts(program)
    blocks = [Block() for _ in starts]
    number = {start: index for index, start in enumerate(starts)}
    for index, (start, stop) in enumerate(
        zip(starts, [*starts[1:], len(program.instructions)], strict=True)
    ):
        for instruction in program.instructions[start:stop]:
            try:
                _add(blocks[index], instruction, slots, program, number)
            except (UnsupportedError, ValueError, IndexError, TypeError) as error:
                place = f"{program.name}: PTX line {instruction.line} ({instruction.source})"
                raise UnsupportedError(
                    f"{place}: {instruction.text!r} is not supported: {error}"
                ) from error
    return Code(program, slots, blocks)


def _starts(program: Program) -> list[int]:
    """Indices where blocks begin.

    At labels, after jumps and barriers, and where programs of a grid may meet.
    """
    starts = {0, *program.labels.values()}
    for index, instruction in enumerate(program.instructions):
        if instruction.opcode in _TERMINATORS:
            starts.add(index + 1)
        if instruction.opcode in _PAUSES or instruction.opcode.startswith("atom."):
            starts.add(index)
    return sorted(start for start in starts if start < len(program.instructions))


def _add(
    block: Block, instruction: Instruction, slots: Slots, program: Program, number: dict[int, int]
) -> None:
    opcode = instruction.opcode
    block.opcodes[opcode] += 1
    if opcode in _PAUSES or opcode.startswith("atom."):
        block.pause = _PAUSES.get(opcode, "atomic")
    if opcode not in _TERMINATORS:
        block.steps.append(_step(instruction, slots))
        return
    block.last = instruction
    if opcode.startswith("bra"):
        block.end = "branch"
        block.target = number[program.labels[str(instruction.operands[0])]]
        block.guard = None if instruction.guard is None else slots.register(instruction.guard)
    elif instruction.guard is not None:
        raise UnsupportedError("a guard before it")
    elif opcode == "bar.sync":
        if instruction.operands != (0,):
            raise UnsupportedError("only barrier 0 of all threads is")
        block.end = "barrier"
    else:
        block.end = "return"


def _step(instruction: Instruction, slots: Slots) -> Step:
    effect = effect_of(instruction, slots)
    if effect is None:
        target, compute = _compute(instruction, slots)
        if compute is None:
            raise UnsupportedError("the emulator does not know it")
        if instruction.guard is None:
            return Step(instruction, target, compute, None)
        effect = _assign(target, compute)
    if instruction.guard is not None:
        effect = _guarded(slots.register(instruction.guard), instruction.negated, effect)
    return Step(instruction, -1, None, effect)


def _assign(target: int, compute: Compute) -> Effect:
    return lambda cta, mask: cta.put(target, compute(cta.r), mask)


def _guarded(guard: int, negated: bool, effect: Effect) -> Effect:
    def run(cta: Any, mask: Array | None) -> None:
        active = ~cta.r[guard] if negated else cta.r[guard]
        if mask is not None:
            active = active & mask
        if active.all():
            effect(cta, None)
        elif active.any():
            effect(cta, active)

    return run


def _compute(instruction: Instruction, slots: Slots) -> tuple[int, Compute | None]:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode.startswith("ld.param."):
        return slots.register(operands[0]), _parameter(instruction, slots)
    if opcode.startswith("mov."):
        return slots.register(operands[0]), _move(instruction, slots)
    if opcode not in OPERATIONS:
        return -1, None
    sources = [
        slots.source(operand, _immediate_width(opcode, index))
        for index, operand in enumerate(operands[1:])
    ]
    return slots.register(operands[0]), OPERATIONS[opcode](*sources)


def _immediate_width(opcode: str, index: int) -> int:
    """Bits of an immediate value, by its place among the sources."""
    name, *_, kind = opcode.split(".")
    if kind == "pred":
        return 1
    if (name in ("shl", "shr") and index == 1) or (name in ("bfe", "lop3", "prmt") and index > 0):
        return 32
    match = _WIDTH.search(kind)
    if match is None:
        raise UnsupportedError("its type is not known")
    width = int(match.group(1)) * (2 if match.group(2) else 1)
    if opcode.startswith("mad.wide") and index == 2:
        return 2 * width
    return 16 if width == 8 else width


def _move(instruction: Instruction, slots: Slots) -> Compute:
    source = instruction.operands[1]
    target = slots.register(instruction.operands[0])
    if isinstance(source, Vector):
        width = slots.widths[target]
        part: Any = unsigned(width // len(source.parts))
        whole: Any = unsigned(width)
        places = [
            slots.source(operand, width // len(source.parts)).slot for operand in source.parts
        ]

        def pack(r: Registers) -> Array:
            size = next(len(r[place]) for place in places if r[place] is not None)
            # LLVM packs registers without a value where the half is not used: let it be no number
            result = np.full((size, len(places)), np.iinfo(part).max, part)
            for index, place in enumerate(places):
                if r[place] is not None:
                    result[:, index] = r[place]
            packed: Array = result.view(whole).ravel()
            return packed

        return pack
    slot = slots.source(source, slots.widths[target]).slot
    if slots.widths[slot] != slots.widths[target]:
        raise UnsupportedError(f"{slots.widths[slot]} bits go to {slots.widths[target]}")
    return lambda r: r[slot]


def _parameter(instruction: Instruction, slots: Slots) -> Compute:
    kind, place = instruction.opcode.removeprefix("ld.param."), instruction.operands[1]
    if not isinstance(place, Address) or place.offset or place.base not in slots.program.params:
        raise UnsupportedError("it is not a whole parameter")
    slot = slots.input(str(place.base), _size(slots.program.params[str(place.base)][1]))
    target: Any = unsigned(slots.widths[slots.register(instruction.operands[0])])
    if _size(kind) != slots.widths[slot]:
        raise UnsupportedError(f"the parameter has {slots.widths[slot]} bits")
    view = _LOAD_TYPES.get(kind, unsigned(slots.widths[slot]))
    return lambda r: r[slot].view(view).astype(target)


def _size(kind: str) -> int:
    match = _WIDTH.search(kind)
    if match is None:
        raise UnsupportedError(f"type {kind}")
    return int(match.group(1))
