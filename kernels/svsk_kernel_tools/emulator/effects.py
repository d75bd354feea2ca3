# SPDX-License-Identifier: Apache-2.0
"""Instructions that reach beyond their thread's registers.

Memory, warps, matrices, asynchronous operations.

``effect_of`` takes an opcode apart and accepts only what is listed here, modifier by modifier.
"""

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from svsk_kernel_tools.emulator.alu import Array, unsigned
from svsk_kernel_tools.emulator.asynchronous import Product
from svsk_kernel_tools.emulator.errors import BarrierError, UnsupportedError
from svsk_kernel_tools.emulator.parse import Instruction, Vector
from svsk_kernel_tools.emulator.slots import Effect, Slots
from svsk_kernel_tools.emulator.tensor import (
    a_matrix,
    b_matrix,
    c_matrix,
    c_registers,
    from_rows,
    to_rows,
)

__all__ = ["effect_of"]

Maker = Callable[[Instruction, Slots, "re.Match[str]"], Effect | None]

_KIND: Final = r"(?:\.v([248]))?\.([bsuf])(8|16|32|64)$"
_SIGNED: Final = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def _always(effect: Effect) -> Maker:
    """What makes an effect that depends on no operand."""
    return lambda instruction, slots, match: effect


def _unpack(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect | None:
    """``mov`` to a vector; None for any other."""
    vector = instruction.operands[0]
    if not isinstance(vector, Vector):
        return None
    width = int(match.group(1))
    source, targets = slots.source(instruction.operands[1], width).slot, slots.targets(vector)
    part: Any = unsigned(width // len(targets))

    def run(cta: Any, mask: Array | None) -> None:
        values = cta.r[source].view(part).reshape(-1, len(targets))
        for index, target in enumerate(targets):
            if target is not None:
                cta.put(target, np.ascontiguousarray(values[:, index]), mask)

    return run


def _load(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    space, letter = match.group(1, 3)
    count, width = int(match.group(2) or 1), int(match.group(4))
    address = slots.address(instruction.operands[1], 64 if space == "global" else 32)
    targets = slots.targets(instruction.operands[0])
    if len(targets) != count:
        raise UnsupportedError(f"{len(targets)} registers for {count} values")
    dtype: Any = _SIGNED[width] if letter == "s" else unsigned(width)
    total = count * width // 8

    def run(cta: Any, mask: Array | None) -> None:
        threads = cta.lanes(mask)
        place = address(cta.r)
        memory = cta.memory if space == "global" else cta.shared
        values = memory.load(place if mask is None else place[threads], total, threads).view(dtype)
        for index, target in enumerate(targets):
            cta.put_some(target, values[:, index], threads)

    return run


def _store(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    space, count, width = match.group(1), int(match.group(2) or 1), int(match.group(4))
    address = slots.address(instruction.operands[0], 64 if space == "global" else 32)
    value = instruction.operands[1]
    parts = value.parts if isinstance(value, Vector) else (value,)
    sources = [slots.source(part, max(width, 16)).slot for part in parts]
    if len(sources) != count:
        raise UnsupportedError(f"{len(sources)} registers for {count} values")
    dtype: Any = unsigned(width)

    def run(cta: Any, mask: Array | None) -> None:
        threads = cta.lanes(mask)
        values = np.empty((len(threads), count), dtype)
        for index, source in enumerate(sources):
            register = cta.r[source]
            values[:, index] = (register if mask is None else register[threads]).astype(dtype)
        place = address(cta.r)
        memory = cta.memory if space == "global" else cta.shared
        memory.store(place if mask is None else place[threads], values.view(np.uint8), threads)

    return run


def _atomic(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    (order, name, letter), width = match.group(1, 2, 3), int(match.group(4))
    acquires, releases = order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
    target = slots.target(instruction.operands[0])
    address = slots.address(instruction.operands[1], 64)
    value = slots.source(instruction.operands[2], width).slot
    dtype: Any = _SIGNED[width] if letter == "s" else unsigned(width)
    functions: dict[str, Any] = {
        "add": lambda old, new: old + new,
        "exch": lambda old, new: new,
        "min": np.minimum,
        "max": np.maximum,
    }
    if name not in functions or letter == "f":
        raise UnsupportedError("the emulator does not know this kind")
    function = functions[name]

    def run(cta: Any, mask: Array | None) -> None:
        threads = cta.lanes(mask)
        places, given = address(cta.r), cta.r[value].view(dtype)
        before = np.empty(len(threads), dtype)
        for index, thread in enumerate(threads):  # one after the other: two may meet at one address
            place, one = places[thread : thread + 1], threads[index : index + 1]
            cta.memory.clocks.visit(
                cta.memory.visitor, int(place[0]), int(thread), acquires, releases
            )
            with cta.memory.atomically():
                old = cta.memory.load(place, width // 8, one).view(dtype)
                before[index] = old[0, 0]
                new = np.asarray(function(old, given[thread : thread + 1]), dtype).reshape(1, 1)
                cta.memory.store(place, new.view(np.uint8), one)
        cta.put_some(target, before.view(unsigned(width)), threads)

    return run


def _copy(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    operands = instruction.operands
    target, source = slots.address(operands[0], 32), slots.address(operands[1], 64)
    total = operands[2]
    policies = 1 if match.group(2) else 0
    allowed = (16,) if match.group(1) == "cg" else (4, 8, 16)
    if not isinstance(total, int) or total not in allowed or len(operands) - policies not in (3, 4):
        raise UnsupportedError(f"{total} bytes, or operands of another kind")
    size = slots.source(operands[3] if len(operands) - policies == 4 else total, 32).slot

    def run(cta: Any, mask: Array | None) -> None:
        threads = cta.lanes(mask)
        sizes = cta.r[size][threads]
        if (sizes > total).any():
            raise UnsupportedError(f"cp.async reads {sizes.max()} bytes to write {total}")
        cta.copies.begin(target(cta.r)[threads], source(cta.r)[threads], total, sizes, threads)

    return run


def _copy_wait(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    pending = None if match.group(1) == "all" else instruction.operands[0]
    if pending is not None and not isinstance(pending, int):
        raise UnsupportedError("the number of groups is not a constant")
    return lambda cta, mask: cta.copies.wait(cta.lanes(mask), pending)


def _policy(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    target = slots.register(instruction.operands[0])
    return lambda cta, mask: cta.put(target, np.zeros(cta.threads, np.uint64), mask)


def _warps(slots: Slots, operand: Any) -> Callable[[Any, Array | None], Array]:
    """What checks that whole warps are there, and that the member mask says so.

    It returns their numbers.
    """
    members = slots.source(operand, 32).slot

    def check(cta: Any, mask: Array | None) -> Array:
        warps: Array = cta.whole_warps(mask)
        if (cta.r[members][cta.lanes(mask)] != np.uint32(0xFFFFFFFF)).any():
            raise UnsupportedError("a member mask of less than the whole warp is not supported")
        return warps

    return check


def _warp_barrier(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    check = _warps(slots, instruction.operands[0])

    def run(cta: Any, mask: Array | None) -> None:
        check(cta, mask)
        cta.shared.warp_barrier(cta.lanes(mask))

    return run


def _shuffle(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    """Source of the rule: PTX ISA, shfl.sync."""
    mode = match.group(1)
    check = _warps(slots, instruction.operands[4])
    target = slots.target(instruction.operands[0])
    a, b, c = (slots.source(operand, 32).slot for operand in instruction.operands[1:4])

    def run(cta: Any, mask: Array | None) -> None:
        check(cta, mask)
        lane = cta.everyone % 32
        by, control = (cta.r[b] & np.uint32(31)).astype(np.int64), cta.r[c].astype(np.int64)
        segment = control >> 8 & 31
        last, first = (lane & segment) | (control & 31 & ~segment), lane & segment
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": first | (by & ~segment),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        cta.put(target, cta.r[a][cta.everyone - lane + source], mask)

    return run


def _reduce(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    functions = {"min": np.minimum, "max": np.maximum, "add": np.add}
    function, dtype = functions[match.group(1)], np.int32 if match.group(2) == "s" else np.uint32
    check = _warps(slots, instruction.operands[2])
    target = slots.register(instruction.operands[0])
    a = slots.source(instruction.operands[1], 32).slot

    def run(cta: Any, mask: Array | None) -> None:
        check(cta, mask)
        result = function.reduce(cta.r[a].view(dtype).reshape(-1, 32), axis=1, dtype=dtype)
        cta.put(target, np.repeat(result, 32).view(np.uint32), mask)

    return run


def _matrix_rows(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    """Both ldmatrix and stmatrix: thread 8 i + j gives the address of row j of matrix i."""
    storing, count = match.group(1) == "stmatrix", int(match.group(2))
    transposed = bool(match.group(3))
    place, registers = instruction.operands if storing else instruction.operands[::-1]
    address = slots.address(place, 32)
    parts = slots.targets(registers)
    if len(parts) != count or None in parts:
        raise UnsupportedError(f"{len(parts)} registers for {count} matrices")
    chosen = [part for part in parts if part is not None]

    def run(cta: Any, mask: Array | None) -> None:
        warps = cta.whole_warps(mask)
        threads = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
        lanes = (warps[:, None] * 32 + np.arange(32)).ravel()
        where = address(cta.r)[threads]
        if storing:
            rows = to_rows([cta.r[register][lanes] for register in chosen], transposed)
            cta.shared.store(where, rows.reshape(-1, 16), threads, together=True)
            return
        rows = cta.shared.load(where, 16, threads, together=True)
        for register, values in zip(
            chosen, from_rows(rows.reshape(-1, count, 8, 16), transposed), strict=True
        ):
            cta.put_some(register, values, lanes)

    return run


def _mma(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    kind = match.group(1)
    if match.group(2) != kind:
        raise UnsupportedError("A and B differ in type")
    d, a, b, c = (slots.targets(operand) for operand in instruction.operands)
    if [len(part) for part in (d, a, b, c)] != [4, 4, 2, 4]:
        raise UnsupportedError("another number of registers")

    def run(cta: Any, mask: Array | None) -> None:
        warps = cta.whole_warps(mask)
        lanes = (warps[:, None] * 32 + np.arange(32)).ravel()

        def take(registers: list[Any]) -> list[Array]:
            return [cta.r[one] if mask is None else cta.r[one][lanes] for one in registers]

        product = a_matrix(take(a), kind) @ b_matrix(take(b), kind)
        for register, values in zip(d, c_registers(product + c_matrix(take(c))), strict=True):
            cta.put_some(register, values, lanes)

    return run


def _all_threads(mask: Array | None) -> None:
    if mask is not None:
        raise BarrierError("the emulator takes wgmma only where all threads of the block are")


def _wgmma(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    columns, kind = int(match.group(1)), match.group(2)
    operands = instruction.operands
    accumulator, in_registers = slots.targets(operands[0]), isinstance(operands[1], Vector)
    flags = operands[4:]
    if (
        match.group(3) != kind
        or columns % 8
        or len(accumulator) != columns // 2
        or None in accumulator
    ):
        raise UnsupportedError("types, or the number of registers")
    if len(flags) != (3 if in_registers else 4) or any(flag not in (-1, 0, 1) for flag in flags):
        raise UnsupportedError("scales or transpositions")
    signs, turns = [int(flag) for flag in flags[:2]], [bool(flag) for flag in flags[2:]]  # type: ignore[arg-type]
    if 0 in signs:
        raise UnsupportedError("a scale of zero")
    product = Product(
        columns,
        kind,
        tuple(one for one in accumulator if one is not None),
        tuple(one for one in slots.targets(operands[1]) if one is not None) if in_registers else (),
        -1 if in_registers else slots.register(operands[1]),
        slots.register(operands[2]),
        slots.source(operands[3], 1).slot,
        (signs[0], signs[1]),
        (False, turns[0]) if in_registers else (turns[0], turns[1]),
    )

    def run(cta: Any, mask: Array | None) -> None:
        _all_threads(mask)
        cta.products.begin(product)

    return run


def _wgmma_order(instruction: Instruction, slots: Slots, match: "re.Match[str]") -> Effect:
    what, pending = match.group(1), instruction.operands[0] if instruction.operands else 0
    if not isinstance(pending, int):
        raise UnsupportedError("the number of groups is not a constant")

    def run(cta: Any, mask: Array | None) -> None:
        _all_threads(mask)
        if what == "wait_group":
            cta.products.wait(pending)
        else:
            (cta.products.fence if what == "fence" else cta.products.commit)()

    return run


_PATTERNS: Final[tuple[tuple[str, Maker], ...]] = (
    (r"mov\.[bu](32|64)$", _unpack),
    (r"ld\.(global)(?:\.(?:cg|ca))?(?:\.L1::evict_\w+)?" + _KIND, _load),
    (r"ld\.(shared)(?:::cta)?" + _KIND, _load),
    (r"st\.(global)(?:\.(?:cg|wb))?" + _KIND, _store),
    (r"st\.(shared)(?:::cta)?" + _KIND, _store),
    (
        r"atom\.global\.(?:gpu|sys)\.(relaxed|acquire|release|acq_rel)\.(\w+)\.([bsu])(32|64)$",
        _atomic,
    ),
    (r"cp\.async\.(ca|cg)\.shared\.global(\.L2::cache_hint)?$", _copy),
    (r"cp\.async\.commit_group$", _always(lambda cta, mask: cta.copies.commit(cta.lanes(mask)))),
    (r"cp\.async\.wait_(group|all)$", _copy_wait),
    (r"createpolicy\.fractional\.L2::evict_(?:first|last)\.b64$", _policy),
    (
        r"fence\.proxy\.async(?:\.shared::cta)?$",
        _always(lambda cta, mask: cta.shared.proxy_fence(cta.lanes(mask))),
    ),
    # The driver sees to the order of kernels.
    (r"griddepcontrol\.(?:wait|launch_dependents)$", _always(lambda cta, mask: None)),
    (r"bar\.warp\.sync$", _warp_barrier),
    (r"shfl\.sync\.(up|down|bfly|idx)\.b32$", _shuffle),
    (r"redux\.sync\.(min|max|add)\.([su])32$", _reduce),
    (
        r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16$",
        _matrix_rows,
    ),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.(bf16|f16)\.f32$", _mma),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.(bf16|f16)$", _wgmma),
    (r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned$", _wgmma_order),
)
_COMPILED: Final = tuple((re.compile(pattern), maker) for pattern, maker in _PATTERNS)


def effect_of(instruction: Instruction, slots: Slots) -> Effect | None:
    """What executes an instruction; None where it is not one of these.

    Raises:
        UnsupportedError: it is one of these, in a form that is not supported.
    """
    for pattern, maker in _COMPILED:
        match = pattern.match(instruction.opcode)
        if match is not None:
            return maker(instruction, slots, match)
    if instruction.opcode.startswith(("tcgen05", "mbarrier", "cp.async.bulk")):
        raise UnsupportedError(
            "tcgen05, mbarrier and bulk copies (sm_100) are not emulated; use sm_80, 86, 89,"
            " 90, 120"
        )
    return None
