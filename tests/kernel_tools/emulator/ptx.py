# SPDX-License-Identifier: Apache-2.0
"""Small PTX kernels for the tests of the emulator."""

from collections.abc import Mapping

import torch

from svsk_kernel_tools.emulator.code import code_of
from svsk_kernel_tools.emulator.cta import Work
from svsk_kernel_tools.emulator.machine import Gpu, Order

__all__ = ["apply", "execute", "kernel", "run"]

_BYTES = {torch.int16: 2, torch.int32: 4, torch.int64: 8}


def kernel(body: str, params: int = 1, threads: int = 32, target: int = 90) -> str:
    """A kernel with pointers as parameters; %rd1, %rd2, ... hold them, %r1 the thread's number."""
    loads = "\n".join(f"ld.param.b64 %rd{index + 1}, [k_param_{index}];" for index in range(params))
    names = ",\n".join(
        f".param .u64 .ptr .global .align 1 k_param_{index}" for index in range(params)
    )
    return f"""
.version 8.7
.target sm_{target}a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{names}
)
.reqntid {threads}
{{
.reg .pred %p<20>;
.reg .b16 %rs<40>;
.reg .b32 %r<200>;
.reg .b64 %rd<40>;
{loads}
mov.u32 %r1, %tid.x;
{body}
ret;
}}
"""


def execute(
    gpu: Gpu,
    ptx: str,
    grid: tuple[int, int, int],
    arguments: Mapping[str, torch.Tensor | int],
    *,
    shared_bytes: int = 0,
    dependent: bool = False,
) -> None:
    """Launch the PTX of one kernel.

    Its arguments are CPU tensors and integers in the order of the parameters; missing ones are
    zero.
    """
    code = code_of(ptx)
    values = [
        one.data_ptr() if isinstance(one, torch.Tensor) else one & (2**64 - 1)
        for one in arguments.values()
    ]
    values += [0] * (len(code.program.params) - len(values))
    gpu.submit(Work(code, grid, values, list(arguments.items()), shared_bytes), dependent)


def run(
    text: str,
    *tensors: torch.Tensor,
    grid: int = 1,
    shared: int = 0,
    late: bool = False,
    order: Order = "forward",
    capability: int = 90,
) -> Gpu:
    """Run a kernel; its arguments are called a, b, c, ..."""
    gpu = Gpu(capability, order, 0, late)
    arguments = dict(zip("abcdefgh", tensors, strict=False))
    execute(gpu, text, (grid, 1, 1), arguments, shared_bytes=shared)
    gpu.flush()
    return gpu


def apply(
    opcode: str, out: torch.dtype, *inputs: torch.Tensor | str, into: str = ""
) -> torch.Tensor:
    """One instruction for every element of 1-D inputs of 16-, 32- or 64-bit integers.

    Strings are immediate values.
    """
    tensors = [one for one in inputs if isinstance(one, torch.Tensor)]
    threads = tensors[0].numel()
    result = torch.zeros(threads, dtype=out)
    lines, operands, names = [], [], {2: "rs", 4: "r", 8: "rd"}
    for index, tensor in enumerate([result, *tensors], start=1):
        size = _BYTES[tensor.dtype]
        lines.append(f"mad.wide.u32 %rd{index + 10}, %r1, {size}, %rd{index};")
        if index > 1:
            lines.append(
                f"ld.global.b{8 * size} {{ %{names[size]}{index + 20} }}, [ %rd{index + 10} + 0 ];"
            )
    place = 1
    for one in inputs:
        place += isinstance(one, torch.Tensor)
        operands.append(one if isinstance(one, str) else f"%{names[_BYTES[one.dtype]]}{place + 20}")
    size = _BYTES[out]
    target = into or f"%{names[size]}30"
    lines.append(f"{opcode} {target}, {', '.join(operands)};")
    if into.startswith("%p"):
        lines.append(f"selp.b32 %r30, 1, 0, {into};")
    lines.append(f"st.global.b{8 * size} [ %rd11 + 0 ], {{ %{names[size]}30 }};")
    run(kernel("\n".join(lines), params=1 + len(tensors), threads=threads), result, *tensors)
    return result
