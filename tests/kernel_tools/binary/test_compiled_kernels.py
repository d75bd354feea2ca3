# SPDX-License-Identifier: Apache-2.0
"""The kernels as they are launched, compiled for every target: registers, memory, instructions."""

import os

import pytest

pytest.importorskip("triton")

from svsk_kernel_tools.binary.aot import Arch, compile_case
from svsk_kernel_tools.binary.case import KernelCase
from svsk_kernel_tools.binary.checks import LIMITS, failures
from svsk_kernel_tools.binary.report import read_facts

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from svsk_kernel_tools.binary.cases import cases
from tests.support.arches import EVERY_KERNEL, IN_PART


def failed_checks(chosen: list[KernelCase], arch: Arch) -> dict[str, list[str]]:
    checked = {
        case.name: failures(read_facts(compile_case(case, arch)), case, LIMITS[arch])
        for case in chosen
    }
    return {name: sentences for name, sentences in checked.items() if sentences}


@pytest.mark.parametrize("arch", EVERY_KERNEL)
def test_every_kernel_passes_every_check(arch: Arch) -> None:
    found = cases(arch)
    assert {case.name.split("-")[0] for case in found} >= {
        "decode16",
        "decode32",
        "decode64",
        "gemm",
        "shrink16",
        "fold",
        "feedback",
    }
    assert failed_checks(found, arch) == {}


@pytest.mark.parametrize("arch", IN_PART)
def test_a_kernel_of_each_kind_passes_every_check(arch: Arch) -> None:
    """The first case of each function: the other blocks and types are compiled with all tests."""
    first = {case.fn: case for case in reversed(cases(arch))}
    assert len(first) == 5
    assert failed_checks(list(first.values()), arch) == {}


@pytest.mark.parametrize("arch", [90, 100, 120])
def test_decode_waits_for_z_only_where_kernels_may_overlap(arch: Arch) -> None:
    for case in cases(arch):
        if case.name in ("decode16-g64", "shrink16-8"):
            ptx = compile_case(case, arch).asm["ptx"]
            wanted = (
                "griddepcontrol.wait"
                if case.name.startswith("decode")
                else "griddepcontrol.launch_dependents"
            )
            assert wanted in ptx
            assert case.name.startswith("shrink") == ("griddepcontrol.wait" not in ptx)


def test_older_gpus_do_not_overlap_kernels() -> None:
    assert all(
        "griddepcontrol" not in str(compile_case(case, 80).asm["ptx"]) for case in cases(80)[:2]
    )
