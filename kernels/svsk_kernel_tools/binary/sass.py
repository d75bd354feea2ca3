# SPDX-License-Identifier: Apache-2.0
"""NVIDIA binaries: the disassemblers of Triton's wheel, and the parsing of what they print."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from svsk_kernel_tools.binary.errors import InspectError
from svsk_kernel_tools.binary.program import Instruction, Kind, Program, read_program

__all__ = ["disassemble", "parse_resource_usage", "parse_sass", "resource_usage", "serialised"]

_LINE: Final = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]*?)\s*;")
_INSTRUCTION: Final = re.compile(
    r"(?:@(?P<guard>!?\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*)"
)
_LABEL: Final = re.compile(r"^\s*(?P<label>[.$\w]+):\s*$")
_TARGET: Final = re.compile(r"`\((?P<label>[^)]+)\)")
_WIDTHS: Final = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

# The first pattern that matches the opcode decides.
_KINDS: Final[tuple[tuple[Kind, str], ...]] = (
    ("mma", r"(HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|OMMA|DMMA|UTC\w*MMA)\b"),
    ("global_copy", r"(LDGSTS|UBLKCP|UTMALDG)\b"),
    ("global_load", r"LDG\b"),
    ("global_store", r"(STG|UTMASTG)\b"),
    ("float_atomic", r"(RED|REDG|ATOM|ATOMG)\b.*\.B?F(16|32|64)"),
    ("counter", r"(RED|REDG|ATOM|ATOMG)\b.*\.(ADD|INC)\b"),
    ("atomic", r"(RED|REDG|ATOM|ATOMG)\b"),
    ("spill", r"(LDL|STL)\b"),
    ("shared", r"(LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM)\b"),
    ("barrier", r"(BAR|UCGABAR\w*)\b"),
    ("fence", r"MEMBAR\b.*\.(GPU|SYS|VC)\b"),
    ("int_to_float", r"I2FP?\b"),
    ("convert", r"(F2F|F2FP|F2I|F2IP|I2I|I2IP|FRND)\b"),
    (
        "float",
        r"(HFMA2|HADD2|HMUL2|HMNMX2|HSETP2|HSET2|FFMA2?|FADD2?|FMUL2?|FMNMX|FSETP|FSEL|DADD|DMUL|DFMA|MUFU)\b",
    ),
    (
        "integer",
        r"(LOP3|PLOP3|SHF|PRMT|IMAD|IADD3?|ISETP|LEA|SEL|SGXT|MOV|VIADD\w*|IMNMX|VIMNMX\w*|IABS|POPC|FLO)\b",
    ),
    (
        "control",
        r"(BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|WARPSYNC|NOP|YIELD|NANOSLEEP|DEPBAR|LDGDEPBAR)\b",
    ),
    ("uniform", r"(U[A-Z]\w+|R2UR|S2UR|LDCU)\b"),
)


def disassemble(cubin: bytes) -> str:
    """The binary's SASS as nvdisasm prints it.

    Raises InspectError if the tool is missing or fails.
    """
    return _run_tool("nvdisasm", "-c", cubin)


def resource_usage(cubin: bytes, entry: str) -> tuple[int, int, int]:
    """Registers, bytes of stack and bytes of local memory of a thread of the kernel ``entry``.

    Raises InspectError if the tool is missing or fails.
    """
    return parse_resource_usage(_run_tool("cuobjdump", "-res-usage", cubin), entry)


def serialised(ptx: str, arch: int) -> bool:
    """Whether the assembler has each product of sm_90's tensor cores wait for the one before.

    Where it cannot prove that nothing else writes their sums, it says so (remark C7515) and puts a
    wait behind each. Raises InspectError if it fails.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"--gpu-name=sm_{arch}a"
        command = [get_ptxas(arch).path, "-v", name, file.name, "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise InspectError(
            f"ptxas failed (exit status {result.returncode}): {result.stderr.strip()}"
        )
    return "C7515" in result.stderr


def _run_tool(name: str, option: str, cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    if not tool.is_file():
        raise InspectError(
            f"{name} is not in this Triton's wheel (expected {tool}): install the Linux wheel of"
            " triton"
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=False
        )
    if result.returncode:
        raise InspectError(
            f"{name} failed (exit status {result.returncode}): {result.stderr.strip()}"
        )
    return result.stdout


def parse_resource_usage(text: str, entry: str) -> tuple[int, int, int]:
    """Read cuobjdump's resource usage of one function; raise InspectError if it is not there."""
    usage = re.search(
        rf"Function {re.escape(entry)}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text
    )
    if usage is None:
        raise InspectError(
            f"cuobjdump printed no resource usage of the function {entry!r}; it printed:"
            f" {text.strip()}"
        )
    registers, stack, local = map(int, usage.groups())
    return registers, stack, local


def parse_sass(text: str, entry: str) -> Program:
    """Read nvdisasm's output.

    ``entry`` names the kernel. Raises InspectError if it is not there.
    """
    return read_program(text, entry, _LABEL, _LINE, _parse_instruction)


def _parse_instruction(line: "re.Match[str]") -> Instruction:
    text = line["text"]
    match = _INSTRUCTION.match(text)
    if match is None:
        raise InspectError(
            f"not a SASS instruction: {text!r}; the parser needs an update for this Triton"
        )
    opcode, operands, guard = match["opcode"], match["operands"], match["guard"]
    root, *modifiers = opcode.split(".")
    kind: Kind = next((kind for kind, pattern in _KINDS if re.match(pattern, opcode)), "other")
    target = None
    falls_through = True
    if root in ("BRA", "JMP", "CALL"):
        label = _TARGET.search(operands)
        target = label["label"] if label else None
        # `BRA.U UP0, ...` and `BRA P1, ...` test their first operand. A call comes back.
        falls_through = root == "CALL" or guard is not None or not operands.startswith("`")
    elif root in ("EXIT", "RET", "BRX"):
        falls_through = guard is not None
    return Instruction(
        opcode=opcode,
        kind=kind,
        num_bytes=(
            _width(root, modifiers) if kind in ("global_load", "global_copy", "global_store") else 0
        ),
        unit=root if kind == "mma" else "",
        target=target,
        falls_through=falls_through,
    )


def _width(root: str, modifiers: list[str]) -> int:
    """Bytes per thread.

    A 32-bit word unless a modifier says otherwise. A bulk copy moves 16 or more.
    """
    if root.startswith("U"):
        return 16
    return next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 4)
