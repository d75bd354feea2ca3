# SPDX-License-Identifier: Apache-2.0
"""The parsing of disassemblies and of Triton's IR, on texts made up for the purpose.

Needs no compiler.
"""

import pytest

from svsk_kernel_tools.binary.errors import InspectError
from svsk_kernel_tools.binary.gcn import parse_gcn, parse_metadata
from svsk_kernel_tools.binary.program import Program, find_main_loop, natural_loops, unordered
from svsk_kernel_tools.binary.sass import parse_resource_usage, parse_sass
from svsk_kernel_tools.binary.ttgir import PointerLoads, count_float_atomics, loads_of_pointer


def sass(*lines: str) -> Program:
    """A program from instructions and labels; addresses are added."""
    text = [
        line if line.endswith(":") else f"        /*{i * 16:04x}*/    {line} ;"
        for i, line in enumerate(lines)
    ]
    return parse_sass("\n".join(["k:", *text]), "k")


def opcodes(program: Program, indices: list[int]) -> list[str]:
    return [program.instructions[i].opcode for i in indices]


def test_innermost_loop_with_most_mma() -> None:
    program = sass(
        ".L_outer:",
        "MOV R0, R1",
        ".L_small:",
        "HMMA.16816.F32 R0, R1, R2, R3",
        "@P0 BRA `(.L_small)",
        ".L_main:",
        "IADD3 R0, R0, R1",
        "HMMA.16816.F32 R0, R1, R2, R3",
        "HMMA.16816.F32 R0, R1, R2, R3",
        "BRA.U UP0, `(.L_main)",
        "@!P1 BRA `(.L_outer)",
        "EXIT",
        ".L_trap:",
        "BRA `(.L_trap)",
    )
    assert opcodes(program, find_main_loop(program)) == [
        "IADD3",
        "HMMA.16816.F32",
        "HMMA.16816.F32",
        "BRA.U",
    ]
    assert len(natural_loops(program)) == 3  # the trap is never reached


def test_waiting_moved_to_the_end_of_the_function_is_no_loop_of_its_own() -> None:
    program = sass(
        "MOV R0, R1",
        ".L_main:",
        "UTCHMMA tmem[UR12], gdesc[UR26]",
        "@!P0 BRA `(.L_wait)",
        ".L_back:",
        "IADD3 R0, R0, R1",
        "@P1 BRA `(.L_main)",
        "UTCHMMA tmem[UR12], gdesc[UR26]",
        "EXIT",
        ".L_wait:",
        "SYNCS.PHASECHK P0, [UR11]",
        "@!P0 BRA `(.L_wait)",
        "BRA `(.L_back)",
    )
    loop = opcodes(program, find_main_loop(program))
    assert loop.count("UTCHMMA") == 1
    assert sorted(loop) == sorted(
        ["UTCHMMA", "BRA", "IADD3", "BRA", "SYNCS.PHASECHK", "BRA", "BRA"]
    )


def test_no_loop_without_mma() -> None:
    assert (
        find_main_loop(sass(".L:", "FFMA R0, R1, R2, R3", "@P0 BRA `(.L)", "HMMA R0, R1", "EXIT"))
        == []
    )


@pytest.mark.parametrize(
    ("text", "kind", "num_bytes"),
    [
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], !P0", "global_copy", 16),
        ("@!P1 LDGSTS.E [R1], [R2.64]", "global_copy", 4),
        ("LDG.E.U16 R1, [R2.64+0x10]", "global_load", 2),
        ("LDG.E.ENL2.256 R1, R2, [R4.64]", "global_load", 32),
        ("LDG.E.128.STRONG.GPU R1, [R2.64]", "global_load", 16),
        ("UBLKCP.S.G [UR1], [UR2], UR3", "global_copy", 16),
        ("@P3 STG.E.64 [R1.64], R2", "global_store", 8),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R1.64], R2", "float_atomic", 0),
        ("ATOMG.E.ADD.F16x2.RN.STRONG.GPU PT, R1, [R2.64], R3", "float_atomic", 0),
        ("ATOMG.E.ADD.STRONG.GPU PT, R0, [R2.64], R5", "counter", 0),
        ("ATOMG.E.EXCH.STRONG.GPU PT, R0, [R2.64], R5", "atomic", 0),
        ("ATOMS.ADD R0, [R1], R2", "shared", 0),
        ("STL.64 [R1], R2", "spill", 0),
        ("I2FP.F32.S32 R1, R2", "int_to_float", 0),
        ("I2F.F16 R1, R2", "int_to_float", 0),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "convert", 0),
        ("MEMBAR.SC.GPU", "fence", 0),
        ("MEMBAR.ALL.CTA", "other", 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier", 0),
    ],
)
def test_kinds_and_widths(text: str, kind: str, num_bytes: int) -> None:
    instruction = sass(text, "EXIT").instructions[0]
    assert (instruction.kind, instruction.num_bytes) == (kind, num_bytes)


def test_barrier_has_to_be_on_every_path() -> None:
    store, count = "STG.E [R1.64], R2", "ATOMG.E.ADD.STRONG.GPU PT, R0, [R2.64], R5"
    around = sass(store, "@P0 BRA `(.L)", "BAR.SYNC 0x0", ".L:", count, "EXIT")
    assert unordered(around, "global_store", "counter") == [(0, 3)]
    after = sass(store, "@P0 BRA `(.L)", "NOP", ".L:", "BAR.SYNC 0x0", count, store, "EXIT")
    assert unordered(after, "global_store", "counter") == []
    loop = sass(".L:", "BAR.SYNC 0x0", count, store, "@P0 BRA `(.L)", "EXIT")
    assert unordered(loop, "global_store", "counter") == []
    assert unordered(loop, "global_store", "counter", "fence") == [(2, 1)]


def test_amd_program_and_metadata() -> None:
    text = (
        "k:\n\ts_mov_b32 s0, 0\n.LBB0_1: ; %loop\n\tglobal_load_dwordx4 v[0:3], v4, s[0:1]\n"
        "\tv_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]\n\tv_cvt_f32_ubyte0_e32 v1, v2\n"
        "\tglobal_load_ushort v1, v2, s[0:1]\n\t.loc 1 2 3\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n"
        "    .private_segment_fixed_size: 8\n    .sgpr_spill_count: 0\n    .vgpr_count:     65\n"
        "    .vgpr_spill_count: 2\n"
    )
    program = parse_gcn(text, "k")
    loop = find_main_loop(program)
    assert [program.instructions[i].kind for i in loop] == [
        "global_load",
        "mma",
        "int_to_float",
        "global_load",
        "control",
    ]
    assert [i.num_bytes for i in program.select("global_load")] == [16, 2]
    metadata = parse_metadata(text)
    assert (
        metadata["vgpr_count"],
        metadata["vgpr_spill_count"],
        metadata["private_segment_fixed_size"],
    ) == (65, 2, 8)


TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [[0, 1], [0, 2], [16, 0]], lane = [[0, 4], [0, 8], [1, 0], [2, 0]]], warp = []}>
module attributes {"ttg.num-warps" = 4 : i32, "ttg.threads-per-warp" = 32 : i32} {
  tt.func public @k(%w_ptr: !tt.ptr<i16> {tt.divisibility = 16 : i32} loc("w_ptr"(#l)), %x: !tt.ptr<f16> loc("x"(#l))) {
    %a = tt.splat %w_ptr : !tt.ptr<i16> -> tensor<64x64x!tt.ptr<i16>, #blocked>
    %b = tt.splat %x : !tt.ptr<f16> -> tensor<32x16x!tt.ptr<f16>, #linear>
    %c:2 = scf.for %i = %l to %u step %s iter_args(%acc = %z, %p = %a) -> (f32, tensor<64x64x!tt.ptr<i16>, #blocked>) {
      %d = ttg.async_copy_global_to_local %p, %v {contiguity = 8 : i32} : tensor<64x64x!tt.ptr<i16>, #blocked>
      %e = tt.addptr %p, %o : tensor<64x64x!tt.ptr<i16>, #blocked>, tensor<64x64xi32, #blocked>
    }
    %f = tt.load %c#1 : tensor<64x64x!tt.ptr<i16>, #blocked>
    %g = tt.load %b : tensor<32x16x!tt.ptr<f16>, #linear>
    %h = tt.atomic_rmw fadd, acq_rel, gpu, %b, %g, %t
"""  # noqa: E501 - the compiler's own lines


def test_loads_are_followed_through_loops() -> None:
    assert loads_of_pointer(TTGIR, "w_ptr") == PointerLoads(
        num_bytes=16, count=2 * 64 * 64 // (8 * 128)
    )
    assert (
        loads_of_pointer(TTGIR.replace("contiguity = 8", "contiguity = 2"), "w_ptr").num_bytes == 4
    )
    assert loads_of_pointer(TTGIR, "x") == PointerLoads(num_bytes=8, count=1)
    assert count_float_atomics(TTGIR) == 1
    with pytest.raises(
        InspectError, match="no pointer argument 'v' in the kernel; it has w_ptr, x"
    ):
        loads_of_pointer(TTGIR, "v")


def test_what_is_not_understood_is_said() -> None:
    with pytest.raises(InspectError, match="no function 'other'"):
        parse_sass("k:\n        /*0000*/   EXIT ;", "other")
    with pytest.raises(InspectError, match=r"not a SASS instruction: '\?!'"):
        sass("?!")
    with pytest.raises(InspectError, match=r"BRA jumps to '\.L_9', a label the disassembly lacks"):
        natural_loops(sass("BRA `(.L_9)"))
    with pytest.raises(InspectError, match="no function 'k'"):
        parse_gcn("", "k")
    with pytest.raises(InspectError, match="lack vgpr_count"):
        parse_metadata("")
    with pytest.raises(InspectError, match="no resource usage of the function 'k'"):
        parse_resource_usage("nothing", "k")
    usage = parse_resource_usage(
        " Function k:\n  REG:7 STACK:8 SHARED:9 LOCAL:10 CONSTANT[0]:1", "k"
    )
    assert usage == (7, 8, 10)
