# SPDX-License-Identifier: Apache-2.0
"""Disassembled kernels, whatever the instruction set: instructions, control flow, the main loop."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from svsk_kernel_tools.binary.errors import InspectError

__all__ = [
    "Instruction",
    "Kind",
    "Program",
    "find_main_loop",
    "natural_loops",
    "read_program",
    "unordered",
]

Kind = Literal[
    "mma",
    "global_load",
    "global_copy",
    "global_store",
    "counter",
    "atomic",
    "float_atomic",
    "spill",
    "shared",
    "barrier",
    "fence",
    "int_to_float",
    "convert",
    "float",
    "integer",
    "uniform",
    "control",
    "other",
]
"""What an instruction does.

``global_copy`` goes from global to shared memory; ``counter`` is an integer atomic addition to
global memory; a ``fence`` orders memory for the whole GPU; ``uniform`` is done once for a warp.
"""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        opcode: With its modifiers, ``LDGSTS.E.BYPASS.128``.
        kind: What it does.
        num_bytes: Per thread, of a load, store or copy of global memory; zero otherwise.
        unit: Name of the tensor-core unit of an ``mma``, empty otherwise.
        target: Label that it may jump to.
        falls_through: Whether the next instruction may follow it.
    """

    opcode: str
    kind: Kind
    num_bytes: int = 0
    unit: str = ""
    target: str | None = None
    falls_through: bool = True


@dataclass(frozen=True)
class Program:
    """A binary's instructions in order, the index of every label, and where the kernel starts."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    entry: int = 0

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """For each instruction those that may follow it.

        Raises InspectError for a jump to an unknown label.
        """
        following = []
        for index, instruction in enumerate(self.instructions):
            after = [index + 1] if instruction.falls_through else []
            if instruction.target is not None:
                if instruction.target not in self.labels:
                    raise InspectError(
                        f"{instruction.opcode} jumps to {instruction.target!r}, a label the"
                        " disassembly lacks: its format is not the one this parser knows; the"
                        " parser needs an update for this Triton"
                    )
                after.append(self.labels[instruction.target])
            following.append(tuple(i for i in after if i < len(self.instructions)))
        return tuple(following)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For each instruction those it may follow, unreachable ones left out."""
        before: list[list[int]] = [[] for _ in self.instructions]
        for index in sorted(_reach([self.entry], lambda i: self.successors[i])):
            for after in self.successors[index]:
                before[after].append(index)
        return tuple(map(tuple, before))

    def select(self, kind: Kind, indices: Iterable[int] | None = None) -> list[Instruction]:
        """Instructions of a kind, out of those with the given indices or of all."""
        chosen = self.instructions if indices is None else [self.instructions[i] for i in indices]
        return [instruction for instruction in chosen if instruction.kind == kind]


def _reach(starts: Iterable[int], neighbours: Callable[[int], Iterable[int]]) -> set[int]:
    """``starts`` and all that is reached from them."""
    seen: set[int] = set()
    todo = list(starts)
    while todo:
        index = todo.pop()
        if index not in seen:
            seen.add(index)
            todo.extend(neighbours(index))
    return seen


def natural_loops(program: Program) -> list[frozenset[int]]:
    """Indices of the instructions of every loop, one set per loop header.

    Loops are found by dominance, not by the order of the code: the assembler moves the waiting for
    a barrier out of a loop's way, to the end of the function, and the jump back from there is no
    loop of its own.
    """
    headers = range(len(program.instructions))
    return [loop for header in headers if (loop := _loop(program, header))]


def _loop(program: Program, header: int) -> frozenset[int]:
    """The header and all that comes back to it without passing it; empty where nothing does."""
    before = program.predecessors[header]
    if len(before) < 2 and header != program.entry:
        return frozenset()  # entered from one place only, it heads no loop
    # A header dominates what cannot be reached without passing it.
    outside = _reach([program.entry], lambda i: () if i == header else program.successors[i])
    latches = [i for i in before if i == header or i not in outside]
    body = _reach(latches, lambda i: () if i == header else program.predecessors[i])
    return frozenset({header} | body) if latches else frozenset()


def read_program(
    text: str,
    entry: str,
    label_line: "re.Pattern[str]",
    instruction_line: "re.Pattern[str]",
    parse: Callable[["re.Match[str]"], Instruction],
) -> Program:
    """Read a disassembly line by line.

    Raises:
        InspectError: it has no function ``entry``.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := label_line.match(line):
            labels[label["label"]] = len(instructions)
        elif match := instruction_line.match(line):
            instructions.append(parse(match))
    if entry not in labels or not instructions:
        raise InspectError(
            f"the disassembly has no function {entry!r}: it was {len(text)} characters,"
            f" {len(labels)} labels"
        )
    return Program(tuple(instructions), labels, labels[entry])


def find_main_loop(program: Program) -> list[int]:
    """Indices, in order, of the innermost loop with the most MMA instructions.

    Empty if no loop has any.
    """
    counts = {loop: len(program.select("mma", loop)) for loop in natural_loops(program)}
    with_mma = [loop for loop, count in counts.items() if count]
    innermost = [loop for loop in with_mma if not any(other < loop for other in with_mma)]
    return sorted(max(innermost, key=lambda loop: counts[loop], default=()))


def unordered(
    program: Program, first: Kind, second: Kind, barrier: Kind = "barrier"
) -> list[tuple[int, int]]:
    """Pairs (i, j): i of kind ``first`` can run before j of kind ``second``, no barrier between.

    For each j the i nearest on each path are found, by a walk backwards that ends at barriers.
    """
    kinds = [instruction.kind for instruction in program.instructions]
    pairs = []
    for index, kind in enumerate(kinds):
        if kind != second:
            continue
        walked = _reach(
            program.predecessors[index],
            lambda i: () if kinds[i] in (barrier, first) else program.predecessors[i],
        )
        pairs += [(i, index) for i in sorted(walked) if kinds[i] == first]
    return pairs
