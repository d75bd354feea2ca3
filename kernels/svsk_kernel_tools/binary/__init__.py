# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels for GPUs that are not here, and check facts read off the binaries.

``python -m svsk_kernel_tools.binary`` compiles every registered case for every target and applies
the checks. Nothing here needs a GPU or its driver; the disassemblers are the ones of Triton's
wheel.
"""

from svsk_kernel_tools.binary.aot import ARCHES, Arch, CompiledKernel, compile_case, parse_arch
from svsk_kernel_tools.binary.case import KernelCase
from svsk_kernel_tools.binary.checks import Limits, failures, limits_for
from svsk_kernel_tools.binary.errors import InspectError
from svsk_kernel_tools.binary.report import KernelFacts, read_facts

__all__ = [
    "ARCHES",
    "Arch",
    "CompiledKernel",
    "InspectError",
    "KernelCase",
    "KernelFacts",
    "Limits",
    "compile_case",
    "failures",
    "limits_for",
    "parse_arch",
    "read_facts",
]
