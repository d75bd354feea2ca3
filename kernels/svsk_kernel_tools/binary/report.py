# SPDX-License-Identifier: Apache-2.0
"""The facts of one compiled kernel that matter for its speed and its correctness."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from svsk_kernel_tools.binary import gcn, sass
from svsk_kernel_tools.binary.aot import CompiledKernel, arch_name
from svsk_kernel_tools.binary.program import Instruction, Program, find_main_loop, unordered
from svsk_kernel_tools.binary.ttgir import PointerLoads, count_float_atomics, loads_of_pointer

__all__ = ["KernelFacts", "read_facts"]


_WGMMA: Final = 90
"""The target whose tensor cores work beside the program."""


@dataclass(frozen=True)
class KernelFacts:
    """What one kernel's binary for one target says.

    Counts are of instructions in the code, not of executions.

    Attributes:
        name: The case's name.
        arch: The target's name, "sm_90" or "gfx942".
        seconds: Wall time of the compilation.
        registers: 32-bit vector registers per thread (lane).
        stack_bytes: Stack per thread; zero on AMD.
        local_bytes: Local (CUDA) or scratch (AMD) memory per thread.
        spills: Loads and stores of local memory (CUDA), vector registers spilled (AMD).
        shared_bytes: Dynamic shared memory of a block.
        tensor_memory_columns: Of sm_100's tensor memory.
        mma: Tensor-core instructions per unit: HMMA, HGMMA, UTCHMMA, MFMA, ...
        copy_bytes: Copies from global to shared memory, by bytes per thread.
        load_bytes: Loads from global memory to registers, by bytes per thread.
        store_bytes: Stores to global memory, by bytes per thread.
        packed_loads: Width and number of the loads of the packed weight; None if the case names no
            such pointer.
        num_instructions: In the whole binary.
        loop_instructions: In the main loop, zero without one. Code that branches can leave out is
            counted.
        loop_mma: Tensor-core instructions in the main loop.
        serialised: Whether each of sm_90's products waits for the one before.
        loop_loads: Loads from global memory to registers in the main loop.
        loop_int_to_float: Conversions from integer to floating point in the main loop.
        loop_kinds: The main loop's instructions by what they do.
        instructions_per_weight: The main loop's instructions per weight, of the whole kernel if it
            has no main loop; None if the case does not say how many weights a thread handles.
        float_atomics: Atomic additions of floating point.
        counters: Integer atomic additions to global memory.
        unordered_stores: Pairs of a store and a counter with no barrier of the block between them.
        unfenced_stores: The same with no memory fence of the GPU between them.
    """

    name: str
    arch: str
    seconds: float
    registers: int
    stack_bytes: int
    local_bytes: int
    spills: int
    shared_bytes: int
    tensor_memory_columns: int
    mma: Mapping[str, int]
    copy_bytes: Mapping[int, int]
    load_bytes: Mapping[int, int]
    store_bytes: Mapping[int, int]
    packed_loads: PointerLoads | None
    num_instructions: int
    loop_instructions: int
    loop_mma: int
    serialised: bool
    loop_loads: int
    loop_int_to_float: int
    loop_kinds: Mapping[str, int]
    instructions_per_weight: float | None
    float_atomics: int
    counters: int
    unordered_stores: int
    unfenced_stores: int


def read_facts(kernel: CompiledKernel) -> KernelFacts:
    """Disassemble a compiled kernel and read its facts.

    Raises:
        InspectError: A disassembler is missing or fails, or its output is not understood.
    """
    case = kernel.case
    if isinstance(kernel.arch, int):
        registers, stack, local = sass.resource_usage(kernel.asm["cubin"], kernel.entry)
        program = sass.parse_sass(sass.disassemble(kernel.asm["cubin"]), kernel.entry)
        spills = len(program.select("spill"))
    else:
        metadata = gcn.parse_metadata(kernel.asm["amdgcn"])
        program = gcn.parse_gcn(kernel.asm["amdgcn"], kernel.entry)
        registers, stack, local = metadata["vgpr_count"], 0, metadata["private_segment_fixed_size"]
        # Scalar registers spill to lanes of vector registers, not to memory.
        spills = metadata["vgpr_spill_count"]
    ttgir = kernel.asm["ttgir"]
    pointer = case.packed_weight_pointer
    return KernelFacts(
        name=case.name,
        arch=arch_name(kernel.arch),
        seconds=round(kernel.seconds, 3),
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        spills=spills,
        shared_bytes=kernel.shared_bytes,
        tensor_memory_columns=kernel.tensor_memory_columns,
        packed_loads=loads_of_pointer(ttgir, pointer) if pointer else None,
        serialised=kernel.arch == _WGMMA and sass.serialised(kernel.asm["ptx"], _WGMMA),
        float_atomics=max(count_float_atomics(ttgir), len(program.select("float_atomic"))),
        **_count(program, case.weights_per_thread),
    )


def _count(program: Program, weights_per_thread: float | None) -> dict[str, Any]:
    """The facts that follow from the instructions alone."""
    loop = find_main_loop(program)
    counted = len(loop) or len(program.instructions)
    return {
        "mma": dict(Counter(instruction.unit for instruction in program.select("mma"))),
        "copy_bytes": _widths(program.select("global_copy")),
        "load_bytes": _widths(program.select("global_load")),
        "store_bytes": _widths(program.select("global_store")),
        "num_instructions": len(program.instructions),
        "loop_instructions": len(loop),
        "loop_mma": len(program.select("mma", loop)),
        "loop_loads": len(program.select("global_load", loop)),
        "loop_int_to_float": len(program.select("int_to_float", loop)),
        "loop_kinds": dict(Counter(program.instructions[i].kind for i in loop).most_common()),
        "instructions_per_weight": counted / weights_per_thread if weights_per_thread else None,
        "counters": len(program.select("counter")),
        "unordered_stores": len(unordered(program, "global_store", "counter")),
        "unfenced_stores": len(unordered(program, "global_store", "counter", "fence")),
    }


def _widths(instructions: Iterable[Instruction]) -> dict[int, int]:
    return dict(sorted(Counter(instruction.num_bytes for instruction in instructions).items()))
