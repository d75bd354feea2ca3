# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels for GPUs that are not here, and check facts read off the binaries.

``python -m svsk_kernels.inspect`` compiles every registered case for every target and applies the checks. Nothing
here needs a GPU or its driver; the disassemblers are the ones of Triton's wheel.
"""

from svsk_kernels.inspect.aot import ARCHES, Arch, CompiledKernel, compile_case, parse_arch
from svsk_kernels.inspect.case import KernelCase
from svsk_kernels.inspect.checks import Limits, failures, limits_for
from svsk_kernels.inspect.errors import InspectError
from svsk_kernels.inspect.report import KernelFacts, read_facts

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
