# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of Triton kernels for a target that need not be present."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from svsk_kernel_tools.binary.case import KernelCase
from svsk_kernel_tools.binary.errors import InspectError

__all__ = ["ARCHES", "Arch", "CompiledKernel", "arch_name", "compile_case", "parse_arch"]

Arch = int | str
"""Compute capability times ten for CUDA (90 is sm_90), the target's name for AMD ("gfx942")."""

ARCHES: Final[tuple[Arch, ...]] = (80, 86, 89, 90, 100, 120, "gfx942")
"""The targets the kernels are written for."""


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler left behind for one case and one target.

    Attributes:
        case: The case compiled.
        arch: The target.
        entry: Name of the kernel's function in the binary.
        asm: Every stage: "ttir", "ttgir", "llir" and "ptx", "cubin" (CUDA) or "amdgcn", "hsaco"
            (AMD).
        shared_bytes: Dynamic shared memory of a block.
        tensor_memory_columns: Of sm_100's tensor memory, zero elsewhere.
        seconds: Wall time of the compilation; short when it came from Triton's cache.
    """

    case: KernelCase
    arch: Arch
    entry: str
    asm: Mapping[str, Any]
    shared_bytes: int
    tensor_memory_columns: int
    seconds: float


def parse_arch(text: str) -> Arch:
    """Read "90", "sm_90" or "gfx942"; raise InspectError for a target that is not in ``ARCHES``."""
    bare = text.strip().lower().removeprefix("sm_")
    arch: Arch = int(bare) if bare.isdigit() else bare
    if arch not in ARCHES:
        raise InspectError(
            f"unknown target {text!r}: expected one of {', '.join(map(arch_name, ARCHES))}"
        )
    return arch


def arch_name(arch: Arch) -> str:
    """Return "sm_90" for 90; an AMD target is its own name."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def compile_case(case: KernelCase, arch: Arch) -> CompiledKernel:
    """Compile one case for one target; needs no GPU.

    Raises:
        InspectError: The case does not fit the kernel, the kernel was made for the interpreter, or
            Triton refused it.
    """
    from triton import compile as triton_compile
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.fn, JITFunction):
        raise InspectError(
            f"case {case.name!r}: expected a function made by @triton.jit, got"
            f" {type(case.fn).__name__}. If that is an interpreted function, TRITON_INTERPRET=1 was"
            " set when its module was imported: unset it."
        )
    case.check_names()
    names = case.fn.arg_names
    # Without these the compiler assumes nothing of a pointer or stride, and every wide load becomes
    # many narrow ones.
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=case.fn, signature=signature, constexprs=dict(case.constexprs), attrs=attributes
    )
    # Later versions of Triton turn the fusion of multiply and add off by default; the kernels count
    # on it.
    options = {"enable_fp_fusion": True, **case.options}
    start = time.perf_counter()
    try:
        compiled = triton_compile(source, target=_target(arch), options=options)
    # Triton has no common base class, and an assembler's failure is one of many kinds
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise InspectError(
            f"case {case.name!r} does not compile for {arch_name(arch)}: {reason}\nChange its block"
            " sizes, num_warps or num_stages, or leave the target out of the case's arches."
        ) from error
    return CompiledKernel(
        case=case,
        arch=arch,
        entry=compiled.metadata.name,
        asm=compiled.asm,
        shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        seconds=time.perf_counter() - start,
    )


def _target(arch: Arch) -> Any:
    from triton.backends.compiler import GPUTarget

    if isinstance(arch, int):
        return GPUTarget("cuda", arch, 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
