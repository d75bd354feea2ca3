# SPDX-License-Identifier: Apache-2.0
"""Host time of a call: ``python -m svsk_kernel_tools.bench.host``.

What the processor does until a GPU has its work. No GPU is needed: tensors are the CPU's, kernels
are compiled as for sm_90 and Triton's driver launches nothing. Everything above it is real: the
layer, the custom op, the choice, the workspaces, and Triton's own part of a launch. What the driver
and CUDA's allocator take on a machine with a GPU comes on top, and is not measured here.

The dense product that follows ``fold`` is left out in the same way: its result is allocated. Every
round runs all candidates in turn, and figures are medians of the thread's processor time.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Final
from unittest import mock

import torch
import triton
import typer
from torch.utils.benchmark import Timer
from triton.backends.compiler import GPUTarget

from svsk_kernel_tools.bench.report import table
from svsk_kernel_tools.bench.shapes import TILE_M, TILE_N
from svsk_kernel_tools.bench.timing import Sampler, Stats, measure
from svsk_kernel_tools.stack_linears import random_linear, stack_linears
from svsk_kernels.gpu import matmul_op
from svsk_kernels.gpu.choice import Gpu
from svsk_kernels.gpu.prepared_launch import PreparedLaunch
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.tile_grid import TileGrid

__all__ = ["app", "measure_host", "no_launches"]

GPU: Final = Gpu(name="NVIDIA H100 80GB HBM3", capability=90, processors=132)
"""What kernels are chosen and compiled for."""

CPU: Final = torch.device("cpu")
SHAPE: Final = (256, 4096)
"""Outputs and inputs: few rows, so that the columns are split and partial sums need a workspace.

No time here depends on the size otherwise.
"""

SIDECARS: Final = {"no sidecar": (0, 0, 0), "tiles": (16, TILE_M, TILE_N), "whole": (32, 0, 0)}
"""Rank and tile of the sidecar; tiles over all 4096 columns are summed from several programs."""

_CALLS: Final = 200
"""Calls of a sample."""

Candidate = Callable[[], Any]


class _Driver:
    """A driver for Triton that compiles for :data:`GPU` and launches nothing."""

    def __init__(self) -> None:
        properties = {"max_shared_mem": GPU.shared_memory, "multiprocessor_count": GPU.processors}
        self.launcher_cls = lambda source, metadata: _launch_nothing  # what a launch calls
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, *_: (None, binary, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", GPU.capability, 32)

    def get_current_device(self) -> str:
        return "no launches"  # Triton keeps compiled kernels per device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


def _launch_nothing(*arguments: Any) -> None:
    return


def _allocate_product(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@contextmanager
def no_launches() -> Iterator[None]:
    """Within, layers on the CPU are served as on :data:`GPU`, up to the driver's launch.

    Results hold anything.

    Raises:
        RuntimeError: Triton interprets kernels in this process.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: interpreted kernels are not launched as compiled ones are."
            " Unset it."
        )
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver())
    try:
        with (
            mock.patch.dict(matmul_op._prepared, clear=True),
            mock.patch.object(matmul_op, "gpu_of", return_value=GPU),
            mock.patch.object(matmul_op, "device_obstacle", return_value=None),
            mock.patch.object(torch.nn.functional, "linear", _allocate_product),
        ):
            yield
    finally:
        config.set_active(before)


def _layer(rank: int, tile_m: int, tile_n: int) -> tuple[TritonKernel, torch.nn.Module]:
    """A prepared layer of :data:`SHAPE`, its kernels compiled."""
    linear = random_linear(
        TileGrid(*SHAPE, tile_m, tile_n),
        torch.bfloat16,
        torch.Generator().manual_seed(0),
        rank=rank,
    )
    stacked = stack_linears([linear], torch.bfloat16)
    kernel, layer = TritonKernel(stacked.spec, CPU), stacked.module()
    kernel.prepare(layer)
    return kernel, layer


def _op(kernel: TritonKernel, layer: torch.nn.Module, x: torch.Tensor) -> Candidate:
    """The custom op as a compiled graph calls it, its arguments already in a list."""
    calls: list[tuple[Any, ...]] = []
    with mock.patch.object(torch.ops.svsk, "matmul", lambda *arguments: calls.append(arguments)):
        kernel(layer, x, None)
    (arguments,) = calls
    op = torch.ops.svsk.matmul.default
    return lambda: op(*arguments)


def _triton_launch(kernel: TritonKernel, layer: torch.nn.Module, x: torch.Tensor) -> Candidate:
    """The last kernel of a product, as Triton itself launches it."""
    calls: list[Any] = []
    with mock.patch.object(PreparedLaunch, "__call__", lambda *arguments: calls.append(arguments)):
        kernel(layer, x, None)
    launch, _, grid, arguments, _ = calls[-1]
    return lambda: launch._kernel[grid](*arguments, **launch._named)


def measure_host(tokens: list[int], rounds: int) -> dict[str, dict[str, Stats]]:
    """Microseconds of every candidate, by number of tokens; of what they are set beside, by ``""``.

    Args:
        tokens: numbers of rows of activations.
        rounds: samples of each candidate.

    Returns:
        ``{"": {"torch.mm": ..., "launch by Triton": ...}, "1": {"layer, tiles": ..., ...}, ...}``
    """
    small = torch.randn(1, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    samplers: dict[tuple[str, str], Sampler] = {
        ("", "torch.mm"): _sampler(lambda: torch.mm(*small))
    }
    with no_launches():
        for name, sidecar in SIDECARS.items():
            kernel, layer = _layer(*sidecar)
            x = torch.zeros(1, SHAPE[1], dtype=torch.bfloat16)
            launch = _triton_launch(kernel, layer, x)
            samplers["", f"launch by Triton, {name}"] = _sampler(launch)
            for m in tokens:
                x = torch.zeros(m, SHAPE[1], dtype=torch.bfloat16)
                samplers[str(m), f"layer, {name}"] = _sampler(partial(kernel, layer, x, None))
                samplers[str(m), f"op, {name}"] = _sampler(_op(kernel, layer, x))
        found = measure(samplers, rounds)
    results: dict[str, dict[str, Stats]] = {}
    for (group, name), stats in found.items():
        results.setdefault(group, {})[name] = stats
    return results


def _sampler(call: Candidate) -> Sampler:
    timer = Timer("call()", globals={"call": call}, timer=time.thread_time)
    return lambda: timer.timeit(_CALLS).median * 1e6


def main(
    rows: Annotated[str, typer.Option(help="Numbers of rows of activations, M.")] = "1,16,256,2048",
    rounds: Annotated[int, typer.Option(min=2, help="Samples of each candidate.")] = 15,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.")
    ] = None,
) -> None:
    """Measure what a call costs on the host, with a driver that launches nothing.

    Prints a table in Markdown, in microseconds.
    """
    torch.set_num_threads(1)
    results = measure_host([int(text) for text in rows.split(",")], rounds)
    columns = [f"{what}, {name}" for name in SIDECARS for what in ("layer", "op")]
    beside = results.pop("")
    lines = [
        [group, *(f"{stats[name].us:.1f}" for name in columns)] for group, stats in results.items()
    ]
    print("\n".join(table(lines, ("M", *columns))))
    print("\n" + "; ".join(f"{name}: {stats.us:.1f}" for name, stats in beside.items()))
    if json_file:
        document = {
            group: {name: asdict(stats) for name, stats in by_name.items()}
            for group, by_name in {"beside": beside, **results}.items()
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
