# SPDX-License-Identifier: Apache-2.0
"""AMD binaries.

The assembly text that Triton keeps, with the resources of the kernel at its end.
"""

import re
from typing import Final

from svsk_kernel_tools.binary.errors import InspectError
from svsk_kernel_tools.binary.program import Instruction, Kind, Program, read_program

__all__ = ["parse_gcn", "parse_metadata"]

_INSTRUCTION: Final = re.compile(r"^\t(?P<opcode>[a-z]\w*)(?P<operands>[^;]*)")
_LABEL: Final = re.compile(r"^(?P<label>[.$\w]+):")
_WIDTH: Final = re.compile(r"_(?:load|store)(?:_lds)?_(?P<type>[a-z]+)(?P<count>x\d|\d+)?")
_TYPE_BYTES: Final = {
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "dword": 4,
}

# The first pattern that matches the opcode decides.
_KINDS: Final[tuple[tuple[Kind, str], ...]] = (
    ("mma", r"v_(mfma|smfmac|wmma|swmmac)_"),
    ("spill", r"scratch_"),
    ("float_atomic", r"(global|buffer|flat)_atomic_\w*_(f16|bf16|f32|f64)"),
    ("counter", r"(global|buffer|flat)_atomic_(add|inc)"),
    ("atomic", r"(global|buffer|flat)_atomic_"),
    ("global_copy", r"(global|buffer)_load_lds_"),
    ("global_load", r"(global|buffer|flat)_load_"),
    ("global_store", r"(global|buffer|flat)_store_"),
    ("shared", r"ds_"),
    ("barrier", r"s_barrier"),
    ("fence", r"buffer_wbl2"),
    ("int_to_float", r"v_cvt_(pk_)?f(16|32|64)_([iu]\d+|ubyte)"),
    ("convert", r"v_cvt_"),
    ("float", r"v_\w*_b?f(16|32|64)"),
    ("integer", r"v_"),
    ("control", r"s_(c?branch|endpgm|setpc|swappc|nop|waitcnt|sleep)"),
    ("uniform", r"s_"),
)


def parse_gcn(text: str, entry: str) -> Program:
    """Read the assembly of a kernel; ``entry`` names it. Raises InspectError if it is not there."""
    return read_program(text, entry, _LABEL, _INSTRUCTION, _parse_instruction)


def parse_metadata(text: str) -> dict[str, int]:
    """Counts at the end of the assembly, such as ``vgpr_count`` and ``vgpr_spill_count``.

    Raises InspectError if the kernel's metadata are not there.
    """
    metadata = {
        name: int(value)
        for name, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)
    }
    required = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    missing = [name for name in required if name not in metadata]
    if missing:
        raise InspectError(
            f"the assembly's metadata lack {', '.join(missing)}; the parser needs an update"
        )
    return metadata


def _parse_instruction(match: "re.Match[str]") -> Instruction:
    opcode, operands = match["opcode"], match["operands"].strip()
    kind: Kind = next((kind for kind, pattern in _KINDS if re.match(pattern, opcode)), "other")
    if kind == "global_load" and re.search(r"\blds\b", operands):
        kind = "global_copy"
    jumps = opcode.startswith(("s_branch", "s_cbranch"))
    return Instruction(
        opcode=opcode,
        kind=kind,
        num_bytes=_width(opcode) if kind in ("global_load", "global_copy", "global_store") else 0,
        unit=opcode.split("_")[1].upper() if kind == "mma" else "",
        target=operands.split()[0] if jumps else None,
        falls_through=not opcode.startswith(("s_branch", "s_endpgm", "s_setpc")),
    )


def _width(opcode: str) -> int:
    """Bytes per lane of ``global_load_dwordx4``, ``global_load_b128`` and their like."""
    match = _WIDTH.search(opcode)
    if match is None:
        return 4
    if match["type"] in ("b", "u", "i", "d"):
        return int(match["count"] or 32) // 8
    return _TYPE_BYTES.get(match["type"], 4) * int((match["count"] or "x1").lstrip("x"))
