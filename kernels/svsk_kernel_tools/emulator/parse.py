# SPDX-License-Identifier: Apache-2.0
"""PTX text to instructions. Only what Triton writes: one entry, no functions, no local memory."""

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Final

from svsk_kernel_tools.emulator.errors import UnsupportedError

__all__ = [
    "SHARED_BASE",
    "Address",
    "Instruction",
    "Operand",
    "Program",
    "Register",
    "Vector",
    "parse",
]

SHARED_BASE: Final = 1024
"""Where shared memory begins.

Not zero, so that null is never valid; the first KiB belongs to the system on sm_90.
"""

_WIDTHS: Final = {f"{letter}{bits}": bits for letter in "bus" for bits in (16, 32, 64)}
_WIDTHS.update(pred=1, b8=8, f16=16, f16x2=32, bf16=16, bf16x2=32, f32=32)

_FILE: Final = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.MULTILINE)
_LOC: Final = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_ENTRY: Final = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.DOTALL)
_PARAM: Final = re.compile(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)")
_RANGE: Final = re.compile(r"^(%?[\w$]+)<(\d+)>$")
_TARGET: Final = re.compile(r"^\.target\s+sm_(\d+)(\w?)", re.MULTILINE)
_GUARD: Final = re.compile(r"^@(!?)([%\w$]+)\s+")
_OPCODE: Final = re.compile(r"^([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_INT: Final = re.compile(r"^-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_LABEL: Final = re.compile(r"\s*([$\w]+):(?!:)")
_OPERANDS: Final = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


@dataclass(frozen=True)
class Register:
    """A register.

    Its name, made unique where it belongs to a scope, and its width in bits, 1 for predicates.
    """

    name: str
    width: int


@dataclass(frozen=True)
class Vector:
    """Several operands in braces; None stands for ``_``, a result nobody wants."""

    parts: tuple["Register | int | float | str | None", ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register, or the name of a parameter or variable."""

    base: "Register | str"
    offset: int


Operand = Register | Vector | Address | int | float | str | None


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``line`` counts from 1 in the PTX, ``source`` is "file.py:12" or empty."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    source: str
    text: str


@dataclass
class Program:
    """A kernel: its instructions in order, and the label before each index that has one."""

    name: str
    target: int  # 90 for sm_90a
    params: dict[str, tuple[int, str]]  # name to position and type
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, Register] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)

    @property
    def opcodes(self) -> set[str]:
        """The opcodes it holds."""
        return {instruction.opcode for instruction in self.instructions}


def parse(text: str) -> Program:
    """Read the PTX of one kernel.

    Raises:
        UnsupportedError: it holds anything but one entry with registers, labels and instructions.
    """
    entries = list(_ENTRY.finditer(text))
    target = _TARGET.search(text)
    if len(entries) != 1 or target is None:
        raise UnsupportedError(
            f"PTX with {len(entries)} entries: the emulator takes one .entry and a .target sm_*."
        )
    name, params, directives = entries[0].groups()
    declared = _PARAM.findall(" ".join(params.split()))
    parameters = {title: (index, kind) for index, (kind, title) in enumerate(declared)}
    needed = re.search(r"\.reqntid\s+(\d+)", directives)
    if needed is None:
        raise UnsupportedError(
            f"{name}: no .reqntid: the emulator needs to know how many threads a block has."
        )
    program = Program(name, int(target.group(1)), parameters, int(needed.group(1)))
    _read_symbols(text[: entries[0].start()], program)
    files = {
        int(number): PurePath(last or first).name for number, first, last in _FILE.findall(text)
    }
    _Reader(program, files, text, entries[0].end()).read()
    return program


def _read_symbols(head: str, program: Program) -> None:
    for match in re.finditer(
        r"^\s*\.(extern|visible|global|const|shared)\b([^;]*);", head, re.MULTILINE
    ):
        line = head[: match.start()].count("\n") + 1
        if match.group(1) != "extern" or ".shared" not in match.group(2) or program.symbols:
            raise UnsupportedError(
                f"{program.name}: PTX line {line}: {match.group(0).strip()!r} is not supported."
            )
        program.symbols[re.split(r"[\s\[]", match.group(2).split(".b8", 1)[1].strip())[0]] = (
            SHARED_BASE
        )


class _Reader:
    """Statements of the body, with scopes of registers."""

    def __init__(self, program: Program, files: dict[int, str], text: str, start: int) -> None:
        self.program, self.files = program, files
        self.line = text[:start].count("\n") + 1
        self.body = text[start:].split("\n")
        self.scopes: list[dict[str, Register]] = [program.registers]
        self.scope_count = 0
        self.source, self.buffer, self.began = "", "", 0

    def read(self) -> None:
        for line in self.body:
            code = line.split("//", 1)[0]
            place = _LOC.match(code.strip())
            if place is not None:
                self.source = f"{self.files.get(int(place.group(1)), '?')}:{place.group(2)}"
            elif self._consume(code):
                return
            self.line += 1
        raise UnsupportedError(f"{self.program.name}: the PTX ends within the kernel.")

    def _consume(self, code: str) -> bool:
        """Take one line; True where the kernel ends."""
        while code.strip() or self.buffer:
            if not self.buffer:
                code = code.lstrip()
                if not code:
                    return False
                label = _LABEL.match(code)
                if label is not None:
                    self.program.labels[label.group(1)] = len(self.program.instructions)
                    code = code[label.end() :]
                    continue
                if code[0] in "{}":
                    if self._scope(code[0]):
                        return True
                    code = code[1:]
                    continue
                self.began = self.line
            statement, end, code = code.partition(";")
            self.buffer += statement + " "
            if not end:
                return False
            statement, self.buffer = self.buffer.strip(), ""
            if statement:
                self._statement(statement)
        return False

    def _scope(self, brace: str) -> bool:
        if brace == "{":
            self.scope_count += 1
            self.scopes.append({})
            return False
        self.scopes.pop()
        return not self.scopes

    def _fail(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.program.name}: PTX line {self.began} ({self.source}): {what}"
        )

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
            return
        if text.startswith((".pragma", ".loc")):
            return
        if text.startswith("."):
            raise self._fail(f"directive {text!r} is not supported")
        guard, whole = _GUARD.match(text), text
        if guard is not None:
            text = text[guard.end() :].strip()
        register = None if guard is None else self._operand(guard.group(2))
        if not isinstance(register, Register | None):
            raise self._fail(f"register {register} is not declared")
        match = _OPCODE.match(text)
        if match is None:
            raise self._fail(f"cannot read {whole!r}")
        operands = tuple(self._operand(part) for part in _split(match.group(2)))
        negated = guard is not None and guard.group(1) == "!"
        self.program.instructions.append(
            Instruction(
                match.group(1),
                operands,
                register,
                negated,
                self.began,
                self.source,
                " ".join(whole.split()),
            )
        )

    def _declare(self, text: str) -> None:
        kind, names = text[4:].strip().removeprefix(".").split(None, 1)
        if kind not in _WIDTHS:
            raise self._fail(f"registers of type .{kind} are not supported")
        suffix = f"#{self.scope_count}" if len(self.scopes) > 1 else ""
        for name in (part.strip() for part in names.split(",")):
            many = _RANGE.match(name)
            count = [str(index) for index in range(int(many.group(2)))] if many else [""]
            for one in (f"{many.group(1) if many else name}{number}" for number in count):
                self.scopes[-1][one] = Register(one + suffix, _WIDTHS[kind])

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            parts = []
            for part in _split(text[1:-1]):
                member = self._operand(part)
                if isinstance(member, Vector | Address):
                    raise self._fail(f"operand {text} is not supported")
                parts.append(member)
            return Vector(tuple(parts))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            place = self._operand(base.strip())
            if not isinstance(place, Register | str):
                raise self._fail(f"address {text} is not supported")
            return Address(place, int(offset.strip() or "0", 0))
        if text == "_":
            return None
        if _INT.match(text):
            return int(text.rstrip("U"), 0)
        if text[:2] in ("0f", "0F"):
            return int(text[2:], 16)  # its bits, which is what registers hold
        if re.match(r"^-?\d+\.\d+$", text):
            return float(text)
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return text  # a label, variable, parameter or special register


def _split(text: str) -> list[str]:
    """Operands, at commas outside of braces and brackets, which do not nest."""
    return [part.strip() for part in _OPERANDS.findall(text) if part.strip()]
