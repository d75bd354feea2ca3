# SPDX-License-Identifier: Apache-2.0
"""The kernels' own check cases, executed as compiled for a target."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from svsk_kernel_tools.bench.cases import Case, cases_for, checked_choices
from svsk_kernel_tools.bench.correctness import BOUNDS, poisoned, relative_error
from svsk_kernel_tools.bench.layers import BenchLayer
from svsk_kernel_tools.emulator.driver import emulated
from svsk_kernel_tools.emulator.errors import EmulateError
from svsk_kernel_tools.emulator.machine import Launch
from svsk_kernels.gpu.choice import Choice, Gpu
from svsk_kernels.gpu.launch import counters

__all__ = ["Result", "sweep"]

_PROCESSORS: Final = 132  # of an H100; they decide into how many parts columns are split


@dataclass(frozen=True)
class Result:
    """What came of one layer, number of tokens and kernel on one target."""

    name: str
    arch: int
    tokens: int
    kernel: str
    instructions: int  # of all warps
    error: float  # relative to float64, Frobenius norm
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def sweep(arch: int, quick: bool) -> Iterator[Result]:
    """Run the small cases of ``svsk_kernel_tools.bench`` on one target.

    With ``quick`` less than half of them.
    """
    gpu, cpu = Gpu(name="", capability=arch, processors=_PROCESSORS), torch.device("cpu")
    for case in cases_for(False, quick):
        if not case.every_kernel:
            continue  # real shapes, which would take hours
        layer = case.layer(cpu)
        generator = torch.Generator().manual_seed(case.k)
        bias = torch.randn(case.n, generator=generator).to(case.dtype) if case.bias else None
        for m in case.tokens:
            x = torch.randn(m, case.k, generator=generator).to(case.dtype)
            for choice in checked_choices(case, gpu, m):
                yield _check(case, layer, x, bias, choice, arch, quick)


def _check(
    case: Case,
    layer: BenchLayer,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    choice: Choice,
    arch: int,
    quick: bool,
) -> Result:
    """Blocks in order and copies at once.

    Then interleaved and late; then without inline PTX and dependent launch.
    """
    problems: list[str] = []
    launches: list[Launch] = []
    error = float("nan")

    def run(choice: Choice, asm: bool | None = None, **settings: Any) -> torch.Tensor:
        with poisoned(), emulated(arch, **settings) as gpu:
            y = layer.run(x, choice, bias, asm)
        launches.extend(gpu.launches)
        return y

    try:
        y_default = run(choice)
        first = len(launches)
        error = relative_error(y_default, layer.expected(x, bias))
        if not error <= BOUNDS[case.dtype]:
            problems.append(f"relative error {error:.1e}, allowed {BOUNDS[case.dtype]:.0e}")
        if not torch.equal(run(choice, order="interleaved", seed=len(x), late=True), y_default):
            problems.append("results depend on the order of blocks or on when copies land")
        plain = replace(choice, pdl=False)
        if not quick and not torch.equal(run(plain, False, order="backward"), y_default):
            problems.append("results differ without inline PTX or dependent launch")
    except EmulateError as failure:
        first = len(launches)
        problems.append(str(failure))
    cpu = torch.device("cpu")
    if counters.busy(cpu):
        problems.append("counters are not zero after the launch")
        counters.reset(cpu)
    executed = sum(sum(launch.instructions.values()) for launch in launches[:first])
    remarks = tuple(sorted({remark for launch in launches for remark in launch.remarks}))
    return Result(case.name, arch, len(x), choice.kernel, executed, error, tuple(problems), remarks)
