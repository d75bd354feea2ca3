# SPDX-License-Identifier: Apache-2.0
"""What every shipped kernel has to fulfil, as sentences about what it does not."""

from dataclasses import dataclass
from typing import Final

from svsk_kernel_tools.binary.aot import Arch
from svsk_kernel_tools.binary.case import KernelCase
from svsk_kernel_tools.binary.report import KernelFacts

__all__ = ["LIMITS", "Limits", "failures"]

_KIB: Final = 1024
_PACKED_LOAD_BYTES: Final = 16  # least width of a load of packed weights, on every target


@dataclass(frozen=True)
class Limits:
    """What a target allows and offers.

    Attributes:
        shared_bytes: Shared memory a block may use, the driver's own kilobyte taken off.
        mma_unit: Prefix of the fastest tensor-core instructions' name.
        tensor_memory_columns: Of tensor memory, zero where there is none.
        loop_int_to_float: Conversions from integer to floating point allowed in the main loop; None
            for any number.
        copies_ahead: Whether loads in loops can be copies to shared memory, turns ahead of their
            use.
    """

    shared_bytes: int
    mma_unit: str
    tensor_memory_columns: int = 0
    loop_int_to_float: int | None = 0
    copies_ahead: bool = True


LIMITS: Final[dict[Arch, Limits]] = {
    80: Limits(163 * _KIB, "HMMA"),
    86: Limits(99 * _KIB, "HMMA"),
    89: Limits(99 * _KIB, "HMMA"),
    90: Limits(227 * _KIB, "HGMMA"),
    100: Limits(227 * _KIB, "UTC", tensor_memory_columns=512),
    120: Limits(99 * _KIB, "HMMA"),
    # No bound on conversions: their cost there is not known.
    "gfx942": Limits(64 * _KIB, "MFMA", loop_int_to_float=None, copies_ahead=False),
}
"""The limits of every target."""


def failures(facts: KernelFacts, case: KernelCase, limits: Limits) -> list[str]:
    """One sentence for each check that the kernel fails; empty if it passes all."""
    return [
        *_memory_failures(facts, limits),
        *_mma_failures(facts, case, limits),
        *_loop_failures(facts, case, limits),
        *_packed_load_failures(facts, case),
        *_order_failures(facts, case),
    ]


def _memory_failures(facts: KernelFacts, limits: Limits) -> list[str]:
    failed = []
    if facts.spills or facts.local_bytes or facts.stack_bytes:
        failed.append(
            f"registers spill: {facts.registers} registers, {facts.spills} spills,"
            f" {facts.stack_bytes} bytes of stack, {facts.local_bytes} of local memory, expected"
            " none; use smaller blocks or more warps"
        )
    if facts.shared_bytes > limits.shared_bytes:
        failed.append(
            f"{facts.shared_bytes} bytes of shared memory, at most {limits.shared_bytes} on this"
            " target; use fewer stages or smaller blocks"
        )
    if facts.tensor_memory_columns > limits.tensor_memory_columns:
        failed.append(
            f"{facts.tensor_memory_columns} columns of tensor memory, at most"
            f" {limits.tensor_memory_columns} on this target; use smaller blocks"
        )
    return failed


def _mma_failures(facts: KernelFacts, case: KernelCase, limits: Limits) -> list[str]:
    unit_name = {"best": limits.mma_unit, "any": "", "none": None}[case.mma]
    if unit_name is None:
        return []
    if not facts.mma:
        return [
            "no tensor-core instruction; the product has to be a tl.dot of 16-bit operands, 16 or"
            " more on each side"
        ]
    if not any(unit.startswith(unit_name) for unit in facts.mma):
        return [
            f"tensor cores through {', '.join(facts.mma)}, expected {unit_name}*; the block may be"
            " too small for it"
        ]
    if facts.loop_mma == 0:
        return [
            "tensor-core instructions, but none in a loop; the main loop was unrolled or does not"
            " hold the product"
        ]
    if case.packed_weight_pointer and facts.serialised:
        return [
            "each tensor-core instruction waits for the one before (ptxas says C7515); nothing but"
            " products may set their sums between the first and the last wait, so tell the"
            " compiler that the main loop is not left out (tl.assume)"
        ]
    return []


def _loop_failures(facts: KernelFacts, case: KernelCase, limits: Limits) -> list[str]:
    failed = []
    if limits.loop_int_to_float is not None and facts.loop_int_to_float > limits.loop_int_to_float:
        failed.append(
            f"{facts.loop_int_to_float} conversions from integer to floating point (I2F) in the"
            f" main loop, expected at most {limits.loop_int_to_float}; put the bits into a float's"
            " mantissa instead"
        )
    if limits.copies_ahead and case.packed_weight_pointer and facts.loop_loads:
        failed.append(
            f"{facts.loop_loads} loads from global memory to registers in the main loop, expected"
            " none; load tiles of 4 bytes a thread or more, which are copied ahead of their use"
        )
    cap = case.max_instructions_per_weight
    if cap is None:
        return failed
    if facts.instructions_per_weight is None:
        failed.append(
            "a bound on instructions per weight, but no weights_per_thread; set both in the case or"
            " neither"
        )
    elif facts.instructions_per_weight > cap:
        failed.append(
            f"{facts.instructions_per_weight:.2f} instructions per weight in the main loop, at most"
            f" {cap:g}"
        )
    return failed


def _packed_load_failures(facts: KernelFacts, case: KernelCase) -> list[str]:
    if facts.packed_loads is None:
        return []
    width, least = facts.packed_loads.num_bytes, _PACKED_LOAD_BYTES
    pointer = case.packed_weight_pointer
    if width < least:
        return [
            f"loads of {pointer} are {width} bytes wide, expected {least}; list the pointer and its"
            " stride in aligned, and keep their inner dimension contiguous"
        ]
    wide = sum(
        count
        for widths in (facts.copy_bytes, facts.load_bytes)
        for size, count in widths.items()
        if size >= least
    )
    if wide < facts.packed_loads.count:
        return [
            f"{wide} loads and copies of {least} bytes in the binary, but those of {pointer} need "
            f"{facts.packed_loads.count}; the compiler split them"
        ]
    return []


def _order_failures(facts: KernelFacts, case: KernelCase) -> list[str]:
    failed = []
    if facts.float_atomics:
        failed.append(
            f"{facts.float_atomics} atomic additions of floating point, whose order changes from"
            " run to run; write partial sums and let the last block add them"
        )
    if case.partial_sums and not facts.counters:
        failed.append("partial sums without a counter: no integer atomic addition to global memory")
    if case.partial_sums and facts.unordered_stores:
        failed.append(
            "no barrier between the stores of the partial sums and the counter, so that another"
            " block may read what is not written yet; put tl.debug_barrier() between them"
        )
    if case.partial_sums and facts.unfenced_stores:
        failed.append(
            "no memory fence between the stores of the partial sums and the counter, so that"
            " another block may see the counter before them; give the counter's tl.atomic_add"
            ' sem="acq_rel"'
        )
    return failed
