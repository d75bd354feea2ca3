# SPDX-License-Identifier: Apache-2.0
"""The kernels as they are launched, compiled for every target: registers, memory, instructions."""

import os

import pytest

pytest.importorskip("triton")

from svsk_kernel_tools.binary.aot import Arch, compile_case
from svsk_kernel_tools.binary.checks import LIMITS, failures
from svsk_kernel_tools.binary.report import read_facts

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from svsk_kernel_tools.binary.cases import cases
from tests.support.arches import EVERY_ARCH


@pytest.mark.parametrize("arch", EVERY_ARCH)
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
    failed = {
        case.name: failures(read_facts(compile_case(case, arch)), case, LIMITS[arch])
        for case in found
    }
    assert {name: sentences for name, sentences in failed.items() if sentences} == {}


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
