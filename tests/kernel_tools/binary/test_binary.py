# SPDX-License-Identifier: Apache-2.0
"""The inspection of compiled kernels, on a kernel of its own.

Good everywhere, and failing each check on request.
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from svsk_kernel_tools.binary import __main__ as command
from svsk_kernel_tools.binary.aot import Arch, CompiledKernel, compile_case, parse_arch
from svsk_kernel_tools.binary.case import KernelCase
from svsk_kernel_tools.binary.checks import LIMITS, failures
from svsk_kernel_tools.binary.errors import InspectError
from svsk_kernel_tools.binary.program import unordered
from svsk_kernel_tools.binary.report import KernelFacts, read_facts
from svsk_kernel_tools.binary.sass import disassemble, parse_sass
from tests.kernel_tools.binary.w4_kernel import w4_matmul
from tests.support.arches import EVERY_ARCH

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

SIGNATURE = {
    "x_ptr": "*fp16",
    "w_ptr": "*i16",
    "y_ptr": "*fp16",
    "part_ptr": "*fp32",
    "counter_ptr": "*i32",
}
SIZES = {"m": "i32", "n": "i32", "k": "i32", "stride_w": "i32"}
ALIGNED = ("x_ptr", "w_ptr", "y_ptr", "part_ptr", "n", "k", "stride_w")
GOOD = {
    "BLOCK_M": 16,
    "BLOCK_N": 64,
    "WORDS": 64,
    "STAGES": 3,
    "DOT": True,
    "CONVERT": False,
    "RESULT": "store",
    "ORDER": "acq_rel",
    "ASSUME": True,
}
THREADS_OF_A_WARP = 32


def make_case(
    warps: int = 4, aligned: tuple[str, ...] = ALIGNED, cap: float | None = 7, **changes: Any
) -> KernelCase:
    constexprs = {**GOOD, **changes}
    return KernelCase(
        name="w4",
        fn=w4_matmul,
        signature={**SIGNATURE, **SIZES},
        constexprs=constexprs,
        aligned=aligned,
        options={"num_warps": warps},
        weights_per_thread=constexprs["BLOCK_N"]
        * 4
        * constexprs["WORDS"]
        / (THREADS_OF_A_WARP * warps),
        max_instructions_per_weight=cap,
        partial_sums=constexprs["RESULT"] == "split",
        packed_weight_pointer="w_ptr",
    )


@functools.lru_cache(maxsize=32)
def compiled(arch: Arch, result: str = "store") -> CompiledKernel:
    return compile_case(make_case(RESULT=result), arch)


def checked(case: KernelCase, arch: Arch) -> tuple[KernelFacts, list[str]]:
    facts = read_facts(compile_case(case, arch))
    return facts, failures(facts, case, LIMITS[arch])


# --- good kernels ---


@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_a_good_kernel_passes_every_check(arch: Arch) -> None:
    kernel = compiled(arch)
    facts = read_facts(kernel)
    assert failures(facts, kernel.case, LIMITS[arch]) == []
    unit = max(facts.mma, key=lambda name: facts.mma[name])
    assert unit == {90: "HGMMA", 100: "UTCHMMA", "gfx942": "MFMA"}.get(arch, "HMMA")
    assert 0 < facts.loop_mma <= sum(facts.mma.values())
    assert 0 < facts.loop_instructions < facts.num_instructions
    assert sum(facts.loop_kinds.values()) == facts.loop_instructions
    assert facts.packed_loads is not None
    assert facts.packed_loads.num_bytes == 16
    assert max(facts.load_bytes if arch == "gfx942" else facts.copy_bytes) == 16
    assert facts.counters == facts.float_atomics == 0
    assert json.loads(json.dumps(dataclasses.asdict(facts)))["registers"] == facts.registers


@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_a_good_split_passes_every_check(arch: Arch) -> None:
    kernel = compiled(arch, "split")
    facts = read_facts(kernel)
    assert failures(facts, kernel.case, LIMITS[arch]) == []
    assert facts.counters == 1


# --- each check fails where it has to, alone ---

# Loads that are too narrow to be copied ahead, or have no turn to be copied in, fail this as well.
_TO_REGISTERS = r"\d+ loads from global memory to registers in the main loop"

BAD = {
    "spill": (
        {"warps": 1, "BLOCK_N": 128, "BLOCK_M": 64, "WORDS": 16, "STAGES": 1, "cap": None},
        f"registers spill.*{_TO_REGISTERS}",
    ),
    "shared": ({"BLOCK_M": 64, "STAGES": 8}, r"\d+ bytes of shared memory, at most 166912"),
    "no tensor cores": ({"DOT": False, "WORDS": 16, "cap": None}, "no tensor-core instruction"),
    "narrow": ({"aligned": ()}, f"{_TO_REGISTERS}.*loads of w_ptr are 2 bytes wide, expected 16"),
    "pointer alone": (
        {"aligned": ("w_ptr",)},
        f"{_TO_REGISTERS}.*loads of w_ptr are 2 bytes wide, expected 16",
    ),
    "conversion": ({"CONVERT": True}, r"128 conversions from integer to floating point \(I2F\)"),
    "float atomics": ({"RESULT": "atomic"}, "8 atomic additions of floating point"),
    "cap": ({"cap": 1.0}, r"\d\.\d\d instructions per weight in the main loop, at most 1"),
    "fence": ({"RESULT": "split", "ORDER": "relaxed"}, "no memory fence between the stores"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_kernel_fails_its_check_only(name: str) -> None:
    changes, sentence = BAD[name]
    _, found = checked(make_case(**changes), 80)
    assert len(found) == 1 + (_TO_REGISTERS in sentence), found
    assert re.search(sentence, "; ".join(found)), found


def test_a_product_that_waits_for_the_one_before_is_found() -> None:
    _, found = checked(make_case(ASSUME=False), 90)
    assert len(found) == 1, found
    assert "ptxas says C7515" in found[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aligned": ()}, "loads of w_ptr are 2 bytes wide"),
        ({"RESULT": "atomic"}, "4 atomic additions of floating point"),
        (
            {"BLOCK_M": 128, "STAGES": 2, "WORDS": 128, "cap": None},
            "bytes of shared memory, at most 65536",
        ),
        ({"cap": 1.0}, "instructions per weight"),
    ],
)
def test_bad_kernels_for_amd(changes: dict[str, Any], sentence: str) -> None:
    _, found = checked(make_case(**changes), "gfx942")
    assert len(found) == 1, found
    assert sentence in found[0]


def test_old_tensor_cores_do_not_pass_for_new_ones() -> None:
    _, found = checked(make_case(warps=2), 90)  # wgmma takes four warps
    assert len(found) == 1, found
    assert "tensor cores through HMMA, expected HGMMA" in found[0]


def test_conversions_inside_the_main_loop_are_counted_on_hopper_too() -> None:
    facts, found = checked(make_case(CONVERT=True, cap=None), 90)
    assert facts.loop_int_to_float == 128
    assert "(I2F)" in found[0]


def test_a_missing_barrier_is_found() -> None:
    """The compiler puts one before every atomic: one is taken out of the binary's text."""
    kernel = compiled(80, "split")
    sass = disassemble(kernel.asm["cubin"])
    assert unordered(parse_sass(sass, kernel.entry), "global_store", "counter") == []
    without = "\n".join(line for line in sass.splitlines() if "BAR.SYNC" not in line)
    assert unordered(parse_sass(without, kernel.entry), "global_store", "counter")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"unordered_stores": 1}, "no barrier between the stores"),
        ({"counters": 0}, "without a counter"),
        ({"tensor_memory_columns": 513}, "513 columns of tensor memory, at most 512"),
        ({"loop_mma": 0}, "none in a loop"),
        ({"copy_bytes": {8: 32}, "load_bytes": {}}, "the compiler split them"),
        ({"instructions_per_weight": None}, "no weights_per_thread"),
    ],
)
def test_sentences_for_what_the_compiler_would_not_do(
    changes: dict[str, Any], sentence: str
) -> None:
    kernel = compiled(100, "split")
    found = failures(dataclasses.replace(read_facts(kernel), **changes), kernel.case, LIMITS[100])
    assert len(found) == 1, found
    assert sentence in found[0]


# --- wrong input ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"signature": SIGNATURE}, "k, m, n, stride_w: neither in signature nor in constexprs"),
        ({"constexprs": {**GOOD, "EXTRA": 1}}, "EXTRA: not an argument of the kernel"),
        ({"aligned": ("w_pointer",)}, "w_pointer: aligned, but not in signature"),
        (
            {"packed_weight_pointer": "weights"},
            "weights: packed_weight_pointer, but not in signature",
        ),
        ({"fn": len}, "expected a function made by @triton.jit, got builtin_function_or_method"),
    ],
)
def test_a_case_that_does_not_fit_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InspectError, match=sentence):
        compile_case(dataclasses.replace(make_case(), **changes), 80)


def test_what_triton_refuses_is_reported_with_the_case() -> None:
    with pytest.raises(
        InspectError, match=r"case 'w4' does not compile for sm_80: (.|\n)*Change its block sizes"
    ):
        compile_case(make_case(BLOCK_M=17), 80)


def test_the_packed_pointer_has_to_be_loaded_from() -> None:
    case = dataclasses.replace(make_case(), packed_weight_pointer="y_ptr")
    with pytest.raises(InspectError, match="loads no tensor from 'y_ptr'"):
        read_facts(dataclasses.replace(compiled(80), case=case))


def test_targets_by_name() -> None:
    assert [parse_arch(text) for text in ("90", "sm_120", "gfx942")] == [90, 120, "gfx942"]
    with pytest.raises(InspectError, match=r"unknown target '75': expected one of sm_80, .*gfx942"):
        parse_arch("75")


# --- the command ---


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_cases(*cases: KernelCase) -> None:
        monkeypatch.setattr(command, "cases", lambda arch: list(cases))

    return set_cases


def test_command_prints_and_writes_facts(register: Any, tmp_path: Path) -> None:
    register(make_case(), dataclasses.replace(make_case(), name="amd only", arches=("gfx942",)))
    out = tmp_path / "facts.json"
    result = CliRunner().invoke(command.app, ["--arch", "80", "--json", str(out)])
    assert (
        CliRunner()
        .invoke(command.app, ["--arch", "80", "--arch", "gfx942", "--kernel", "amd only"])
        .exit_code
        == 0
    )
    assert result.exit_code == 0, result.output
    assert "1 passed, 0 failed" in result.output
    (entry,) = json.loads(out.read_text())
    assert entry["facts"]["arch"] == "sm_80"
    assert entry["failures"] == []


def test_command_fails_with_a_failed_check_or_compilation(register: Any) -> None:
    bad = dataclasses.replace(make_case(cap=1.0), name="bad [cap]")
    register(make_case(), bad, dataclasses.replace(make_case(BLOCK_M=17), name="odd"))
    result = CliRunner().invoke(command.app, ["--arch", "80"])
    assert result.exit_code == 1
    assert "FAIL bad [cap] sm_80:" in result.output
    assert "FAIL odd sm_80: case 'odd' does not compile" in result.output
    assert "1 passed, 2 failed" in result.output
    assert CliRunner().invoke(command.app, ["--arch", "80", "--kernel", "w4"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--kernel", "x"], "no case x"), (["--arch", "1"], "unknown target")],
)
def test_command_refuses_unknown_names(register: Any, arguments: list[str], sentence: str) -> None:
    register(make_case())
    result = CliRunner().invoke(command.app, arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
