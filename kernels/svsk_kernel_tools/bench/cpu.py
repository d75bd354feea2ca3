# SPDX-License-Identifier: Apache-2.0
"""Speed of layers on a CPU: ``python -m svsk_kernel_tools.bench.cpu``.

Every repeat calls all candidates in turn, so that they share the machine's moods; figures are
medians. With ``--threads 1`` the clock is the thread's processor time, which other processes hardly
disturb. Weights are random: time depends on shapes only. vLLM's own W4A16 kernel is measured where
vLLM is installed.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from svsk_kernels.codebook import CODEBOOKS, Codebook
from svsk_kernels.cpu.cpu_kernel import CpuKernel
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup

__all__ = ["app", "measure_shape", "random_layer"]

SHAPES: Final = {"gate_up": (19456, 2560), "down": (2560, 9728), "o": (2560, 4096)}
"""Outputs and inputs of layers of Qwen3-4B."""

_GROUP: Final = 64
_REPEATS: Final = 3
_HEADINGS: Final = (
    "layer",
    "M",
    "F.linear bf16, us",
    "W4A16 of vLLM",
    "int4 no sidecar",
    "int4 tiles",
    "int4 whole",
    "quad8 tiles",
    "sidecar / base: tiles",
    "whole",
    "int4 tiles vs W4A16",
    "vs F.linear",
)


@dataclass(frozen=True)
class Layout:
    """Tiles and rank of a sidecar; a tile of 0 x 0 is the whole matrix."""

    rank: int
    rows: int = 0
    columns: int = 0


LAYOUTS: Final = {"tiles": Layout(16, 512, 1024), "whole": Layout(32)}
"""The original method's tiles, and whole-matrix factors.

Run-time factors are bfloat16 whatever was stored.
"""


def random_layer(
    n: int, k: int, codebook: Codebook, layout: Layout | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer of random bfloat16 scales, codes and sidecar, ready to call with [M, k].

    Args:
        n: outputs.
        k: inputs, a multiple of 64.
        codebook: of the base.
        layout: of the sidecar, None for none.
    """
    tensors = {
        "weight_packed": torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32),
        "weight_scale": torch.rand(n, k // _GROUP).bfloat16(),
    }
    plan = None
    if layout:
        rows, columns = layout.rows or n, layout.columns or k
        groups = [SlotGroup(n // rows, rows, layout.rank, 0)]
        if n % rows:
            groups.append(SlotGroup(1, n % rows, layout.rank, n - n % rows))
        plan = SidecarPlan(n, (Bundle((*range(0, k, columns), k), tuple(groups)),))
        tensors |= {
            "sidecar_u": torch.randint(-128, 128, (plan.u_numel,), dtype=torch.int8),
            "sidecar_v": torch.randint(-128, 128, (plan.v_numel,), dtype=torch.int8),
            "sidecar_gain": torch.rand(plan.gain_numel) * 1e-5,
        }
    layer = torch.nn.Module()
    replace_parameters(layer, tensors)
    kernel = CpuKernel(LayerSpec(n, k, _GROUP, codebook, torch.bfloat16, plan))
    kernel.prepare(layer)
    return lambda x: kernel(layer, x, None)


def _vllm_w4a16(n: int, k: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """vLLM's CPUWNA16 kernel without a sidecar, on random codes in its own layout."""
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint
    except ImportError:
        return None
    codes = torch.randint(-(2**31), 2**31 - 1, (n // 16, k * 2), dtype=torch.int32)
    scale = torch.rand(k // _GROUP, n).bfloat16()
    hint = _get_isa_hint(torch.bfloat16)

    def call(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = ops.cpu_gemm_wna16(x, codes, scale, None, None, 8, hint)
        return y

    return call


def measure_shape(n: int, k: int, rows: list[int], seconds: float) -> dict[int, dict[str, float]]:
    """Median microseconds of every candidate, by number of rows of activations.

    Args:
        n: outputs.
        k: inputs.
        rows: numbers of rows.
        seconds: to spend on each, all candidates together.
    """
    weight = torch.randn(n, k).bfloat16()
    candidates: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "linear": lambda x: F.linear(x, weight)
    }
    w4a16 = _vllm_w4a16(n, k)
    if w4a16:
        candidates["w4a16"] = w4a16
    for codebook in ("int4", "quad8"):
        assert codebook in CODEBOOKS
        candidates[f"{codebook}_base"] = random_layer(n, k, codebook, None)
        for name, layout in LAYOUTS.items():
            candidates[f"{codebook}_{name}"] = random_layer(n, k, codebook, layout)
    return {m: _interleaved(candidates, torch.randn(m, k).bfloat16(), seconds) for m in rows}


def _interleaved(
    candidates: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    seconds: float,
) -> dict[str, float]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call(x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["linear"]) < _REPEATS:
        for name, call in candidates.items():
            start = clock()
            call(x)
            times[name].append(clock() - start)
    return {name: statistics.median(found) * 1e6 for name, found in times.items()}


def table_rows(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[list[str]]:
    """Rows under the headings of the table."""
    rows = []
    for name, by_m in results.items():
        for m, t in by_m.items():
            base, tiles = t["int4_base"], t["int4_tiles"]
            times = [t["linear"], t.get("w4a16"), base, tiles, t["int4_whole"], t["quad8_tiles"]]
            shares = [f"{t[f'int4_{layout}'] / base - 1:.2f}" for layout in LAYOUTS]
            speeds = [
                f"{t[other] / tiles:.2f}x" if other in t else "" for other in ("w4a16", "linear")
            ]
            rows.append(
                [
                    name,
                    str(m),
                    *("" if us is None else f"{us:.0f}" for us in times),
                    *shares,
                    *speeds,
                ]
            )
    return rows


def main(
    rows: Annotated[
        str, typer.Option(help="Numbers of rows of activations, M.")
    ] = "1,8,64,512,2048",
    shapes: Annotated[str, typer.Option(help="Layers of Qwen3-4B.")] = ",".join(SHAPES),
    seconds: Annotated[float, typer.Option(min=0.0, help="Per shape and M.")] = 3.0,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as PyTorch takes.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table there.")] = None,
) -> None:
    """Measure layers against bfloat16 and against vLLM's own 4-bit kernel without a sidecar."""
    if threads:
        torch.set_num_threads(threads)
    unknown = [name for name in shapes.split(",") if name not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(SHAPES)}")
    counts = [int(text) for text in rows.split(",")]
    results = {name: measure_shape(*SHAPES[name], counts, seconds) for name in shapes.split(",")}
    found = table_rows(results)
    table = Table(*_HEADINGS)
    for row in found:
        table.add_row(*row)
    Console(width=200).print(table)
    if json_file:
        document: dict[str, Any] = {"threads": torch.get_num_threads(), "microseconds": results}
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if markdown:
        lines = [_HEADINGS, ["---"] * len(_HEADINGS), *found]
        markdown.write_text(
            "".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8"
        )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
