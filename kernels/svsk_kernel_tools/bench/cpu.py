# SPDX-License-Identifier: Apache-2.0
"""Speed of layers on a CPU: ``python -m svsk_kernel_tools.bench.cpu``.

Every round calls all candidates in turn, so that they share the machine's moods; figures are
medians. With ``--threads 1`` the clock is the thread's processor time, which other processes hardly
disturb. Weights are random: time depends on shapes only. vLLM's own W4A16 kernel is measured where
vLLM is installed and activations are bfloat16. ``--instructions avx2 --dtype float32`` measures the
path of a processor that has no more.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
import torch.nn.functional as F
import typer
from torch.utils.benchmark import Timer

from svsk_kernel_tools.bench.report import table
from svsk_kernel_tools.bench.shapes import GROUP_SIZE, TILE_M, TILE_N
from svsk_kernel_tools.bench.timing import Sampler, measure
from svsk_kernel_tools.stack_linears import random_linear, stack_linears
from svsk_kernels.codebook import Codebook
from svsk_kernels.cpu.cpu_kernel import CpuKernel
from svsk_kernels.cpu.processor import has_avx512
from svsk_kernels.tile_grid import TileGrid

__all__ = ["app", "measure_shape"]

SHAPES: Final = {"gate_up": (19456, 2560), "down": (2560, 9728), "o": (2560, 4096)}
"""Outputs and inputs of layers of Qwen3-4B."""


@dataclass(frozen=True)
class Layer:
    """How a layer is stored.

    Attributes:
        codebook: of the base.
        rank: of the sidecar, whose run-time factors are bfloat16 whatever was stored.
        tile_m: rows of a tile of the sidecar; 0 is the whole matrix.
        tile_n: columns of one.
        group_size: weights that share a scale.
        row_scaled: scales in two levels, whose codes are bytes at run time, of 6 bits or of 8.
        int8: activations are rounded to 8 bits.
    """

    codebook: Codebook = "int4"
    rank: int = 0
    tile_m: int = 0
    tile_n: int = 0
    group_size: int = GROUP_SIZE
    row_scaled: bool = False
    int8: bool = False


LAYERS: Final = {
    "int4_base": Layer(),
    "int4_tiles": Layer(rank=16, tile_m=TILE_M, tile_n=TILE_N),
    "int4_whole": Layer(rank=32),
    "quad8_tiles": Layer("quad8", 16, TILE_M, TILE_N),
    "int4_two_level_32": Layer(group_size=32, row_scaled=True),
    "int4_two_level_16": Layer(group_size=16, row_scaled=True),
    "int8_base": Layer(int8=True),
    "int8_whole": Layer(rank=32, int8=True),
    "int8_two_level_32": Layer("quad8", group_size=32, row_scaled=True, int8=True),
}
"""Candidates by name; tiles are the original method's."""

_HEADINGS: Final = (
    "layer",
    "M",
    "F.linear, us",
    "W4A16 of vLLM",
    "int4 no sidecar",
    "int4 tiles",
    "int4 whole",
    "quad8 tiles",
    "two levels, groups of 32",
    "of 16",
    "sidecar / base: tiles",
    "whole",
    "two levels / base: 32",
    "16",
    "int4 tiles vs W4A16",
    "vs F.linear",
    "int8 activations: no sidecar, us",
    "whole",
    "quad8, two levels, groups of 32",
    "no sidecar vs F.linear",
    "whole vs F.linear",
)

Candidate = Callable[[torch.Tensor], torch.Tensor]
"""A product [M, n] from [M, k]."""


def _svsk_layer(
    n: int, k: int, stored: Layer, dtype: torch.dtype, instructions: str | None
) -> Candidate:
    grid = TileGrid(n, k, stored.tile_m, stored.tile_n)
    linear = random_linear(
        grid,
        dtype,
        torch.Generator().manual_seed(0),
        codebook=stored.codebook,
        group_size=stored.group_size,
        rank=stored.rank,
        row_scaled=stored.row_scaled,
    )
    stacked = stack_linears([linear], dtype)
    kernel, layer = CpuKernel(stacked.spec, "int8" if stored.int8 else "exact"), stacked.module()
    kernel.instructions = instructions or kernel.instructions
    kernel.prepare(layer)
    return lambda x: kernel(layer, x, None)


def _vllm_w4a16(n: int, k: int) -> Candidate | None:
    """vLLM's CPUWNA16 kernel without a sidecar, on random codes in its own layout."""
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint
    except ImportError:
        return None
    if not has_avx512():  # vLLM builds it for AVX-512 alone
        return None
    codes = torch.randint(-(2**31), 2**31 - 1, (n // 16, k * 2), dtype=torch.int32)
    scale = torch.rand(k // GROUP_SIZE, n).bfloat16()
    hint = _get_isa_hint(torch.bfloat16)

    def call(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = ops.cpu_gemm_wna16(x, codes, scale, None, None, 8, hint)
        return y

    return call


def measure_shape(
    n: int,
    k: int,
    tokens: list[int],
    rounds: int,
    dtype: torch.dtype = torch.bfloat16,
    instructions: str | None = None,
) -> dict[int, dict[str, float]]:
    """Median microseconds of every candidate for a weight [n, k], by number of rows M.

    Args:
        n: outputs.
        k: inputs.
        tokens: the numbers of rows.
        rounds: calls of each candidate.
        dtype: of weights and activations.
        instructions: of the kernel's path; None is the one that it takes here.
    """
    weight = torch.randn(n, k).to(dtype)
    candidates: dict[str, Candidate] = {"linear": lambda x: F.linear(x, weight)}
    if dtype == torch.bfloat16 and (w4a16 := _vllm_w4a16(n, k)):
        candidates["w4a16"] = w4a16
    candidates |= {
        name: _svsk_layer(n, k, layer, dtype, instructions) for name, layer in LAYERS.items()
    }
    medians = {}
    for m in tokens:
        x = torch.randn(m, k).to(dtype)
        samplers = {name: _sampler(call, x) for name, call in candidates.items()}
        medians[m] = {name: stats.us for name, stats in measure(samplers, rounds).items()}
    return medians


def _sampler(call: Candidate, x: torch.Tensor) -> Sampler:
    threads = torch.get_num_threads()
    clock = time.thread_time if threads == 1 else time.perf_counter
    timer = Timer("call(x)", globals={"call": call, "x": x}, timer=clock, num_threads=threads)
    return lambda: timer.timeit(1).median * 1e6


def table_rows(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[list[str]]:
    """Rows under the headings of the table."""
    rows = []
    for name, by_m in results.items():
        for m, us in by_m.items():
            tiles, whole, base = us["int4_tiles"], us["int4_whole"], us["int4_base"]
            two_levels = [us["int4_two_level_32"], us["int4_two_level_16"]]
            times = [us["linear"], us.get("w4a16"), base, tiles, whole, us["quad8_tiles"]]
            cells = ["" if time is None else f"{time:.0f}" for time in (*times, *two_levels)]
            cells += [f"{sidecar / base - 1:.2f}" for sidecar in (tiles, whole)]
            cells += [f"{finer / base:.2f}" for finer in two_levels]
            others = [us.get("w4a16"), us["linear"]]
            cells += ["" if other is None else f"{other / tiles:.2f}x" for other in others]
            rounded = [us["int8_base"], us["int8_whole"]]
            cells += [f"{time:.0f}" for time in (*rounded, us["int8_two_level_32"])]
            cells += [f"{us['linear'] / time:.2f}x" for time in rounded]
            rows.append([name, str(m), *cells])
    return rows


def main(
    rows: Annotated[
        str, typer.Option(help="Numbers of rows of activations, M.")
    ] = "1,8,64,512,2048",
    shapes: Annotated[
        str, typer.Option(help="Layers of Qwen3-4B, or outputs and inputs such as 4864x896.")
    ] = ",".join(SHAPES),
    rounds: Annotated[int, typer.Option(min=2, help="Calls of each candidate.")] = 7,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of weights and activations.")
    ] = "bfloat16",
    instructions: Annotated[
        Literal["avx2", "avx512", "avx512_bf16"] | None,
        typer.Option(help="Of the kernel's path; the best here if not given."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as PyTorch takes.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.")
    ] = None,
) -> None:
    """Measure layers against dense ones and against vLLM's own 4-bit kernel without a sidecar.

    Prints a table in Markdown.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = {name: _shape(name) for name in shapes.split(",")}
    tokens = [int(text) for text in rows.split(",")]
    results = {
        name: measure_shape(*shape, tokens, rounds, getattr(torch, dtype), instructions)
        for name, shape in chosen.items()
    }
    print("\n".join(table(table_rows(results), _HEADINGS)))
    if json_file:
        document: dict[str, Any] = {"threads": torch.get_num_threads(), "microseconds": results}
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _shape(name: str) -> tuple[int, int]:
    """Outputs and inputs of a named layer, or of one written as ``NxK``."""
    n, _, k = name.partition("x")
    if name not in SHAPES and not (n.isdecimal() and k.isdecimal()):
        raise typer.BadParameter(
            f"{name}: expected one of {', '.join(SHAPES)}, or such as 4864x896"
        )
    return SHAPES.get(name) or (int(n), int(k))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
