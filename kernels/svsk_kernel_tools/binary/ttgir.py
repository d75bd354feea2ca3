# SPDX-License-Identifier: Apache-2.0
"""How wide the loads from one pointer argument are, read off Triton's GPU IR.

A binary does not say which load belongs to which argument. The IR does, and it holds the layout
from which the compiler takes the width; the binary then has to hold as many loads of that width.
"""

import math
import re
from dataclasses import dataclass
from typing import Final

from svsk_kernel_tools.binary.errors import InspectError

__all__ = ["PointerLoads", "count_float_atomics", "loads_of_pointer"]

_ARGUMENT: Final = re.compile(r'(?P<value>%[\w#]+): !tt\.ptr<[^>]*>[^%]*?loc\("(?P<name>\w+)"')
_RESULT: Final = re.compile(r"^\s*(?P<value>%[\w#]+)(?::\d+)? = (?P<rest>.*)")
_VALUE: Final = re.compile(r"%[\w#]+")
_LOOP_ARGUMENT: Final = re.compile(r"(?P<inner>%[\w#]+) = (?P<outer>%[\w#]+)")
_LOAD: Final = re.compile(
    r"^(tt\.load|ttg\.async_copy_global_to_local|\w+\.buffer_load\w*) (?P<pointer>%[\w#]+)"
)
_TENSOR: Final = re.compile(
    r"tensor<(?P<shape>(?:\d+x)+)(?P<type>!tt\.ptr<\w+>|\w+), (?P<layout>#\w+)>"
)
_BLOCKED: Final = re.compile(
    r"^(?P<name>#\w+) = #ttg\.blocked<\{sizePerThread = \[(?P<size>[\d, ]+)\].*order ="
    r" \[(?P<order>\d+)",
    re.MULTILINE,
)
_LINEAR: Final = re.compile(
    r"^(?P<name>#\w+) = #ttg\.linear<\{register = \[(?P<bases>.*?)\], lane", re.MULTILINE
)
_THREADS: Final = re.compile(r'"ttg\.(?:num-warps|threads-per-warp)" = (\d+)')


@dataclass(frozen=True)
class PointerLoads:
    """The loads from one pointer.

    Attributes:
        num_bytes: Width of the narrowest, per thread.
        count: How many instructions of that width (or wider) one thread needs for all of them.
    """

    num_bytes: int
    count: int


def count_float_atomics(ttgir: str) -> int:
    """Number of floating-point atomic additions.

    Their result depends on the order in which blocks arrive.
    """
    return len(re.findall(r"atomic_rmw fadd", ttgir))


def loads_of_pointer(ttgir: str, name: str) -> PointerLoads:
    """Widths of the loads and copies from the pointer argument ``name``.

    Raises:
        InspectError: The kernel has no such pointer argument, or loads nothing from it.
    """
    arguments = {found["name"]: found["value"] for found in _ARGUMENT.finditer(ttgir)}
    if name not in arguments:
        raise InspectError(
            f"no pointer argument {name!r} in the kernel; it has"
            f" {', '.join(sorted(arguments)) or 'none'}"
        )
    vectors = _vectors(ttgir)
    threads = math.prod(map(int, _THREADS.findall(ttgir)))
    widths, count = [], 0
    for line in _load_lines(ttgir, arguments[name]):
        tensor = _TENSOR.search(line)
        if tensor is None:
            continue  # a scalar
        bits = re.search(r"\d+", tensor["type"])
        element = int(bits[0]) // 8 if bits else 4
        contiguity = re.search(r"contiguity = (\d+)", line)
        vector = min(
            vectors.get(tensor["layout"], 1),
            int(contiguity[1]) if contiguity else 1 << 10,
            16 // element,
        )
        widths.append(vector * element)
        count += math.ceil(
            math.prod(map(int, tensor["shape"].rstrip("x").split("x"))) / (vector * threads)
        )
    if not widths:
        raise InspectError(
            f"the kernel loads no tensor from {name!r}: name the argument that holds the packed"
            " weight"
        )
    return PointerLoads(min(widths), count)


def _load_lines(ttgir: str, pointer: str) -> list[str]:
    """Lines of loads whose pointer comes from ``pointer``, by operations and loop arguments."""
    derived = {pointer}
    loads: dict[int, str] = {}
    size = 0
    while len(derived) != size:  # once more for what is only known at a loop's end
        size = len(derived)
        for number, line in enumerate(ttgir.splitlines()):
            result = _RESULT.match(line)
            rest = result["rest"] if result else line.strip()
            load = _LOAD.match(rest)
            if load:
                if load["pointer"] in derived:
                    loads[number] = line
            elif "iter_args(" in rest and result:
                for index, found in enumerate(
                    _LOOP_ARGUMENT.finditer(rest.partition("iter_args(")[2])
                ):
                    if found["outer"] in derived:
                        derived |= {found["inner"], f"{result['value']}#{index}", result["value"]}
            elif result and "!tt.ptr" in rest and derived.intersection(_VALUE.findall(rest)):
                derived.add(result["value"])
    return [loads[number] for number in sorted(loads)]


def _vectors(ttgir: str) -> dict[str, int]:
    """Per layout how many neighbouring elements one thread holds."""
    vectors = {}
    for found in _BLOCKED.finditer(ttgir):
        vectors[found["name"]] = int(found["size"].split(",")[int(found["order"])])
    for found in _LINEAR.finditer(ttgir):
        vectors[found["name"]] = _linear_vector(re.findall(r"\[([\d, ]+)\]", found["bases"]))
    return vectors


def _linear_vector(bases: list[str]) -> int:
    """Elements that the register bases [0, 1], [0, 2], ... of a linear layout put side by side."""
    vector, axis = 1, None
    for base in bases:
        steps = [int(step) for step in base.split(",")]
        along = [i for i, step in enumerate(steps) if step == vector]
        if sum(map(bool, steps)) != 1 or not along or axis not in (None, along[0]):
            break
        axis, vector = along[0], vector * 2
    return vector
