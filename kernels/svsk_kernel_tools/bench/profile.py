# SPDX-License-Identifier: Apache-2.0
"""``python -m svsk_kernel_tools.bench.profile``.

Hardware counters of the kernels, read by Nsight Compute (``ncu``).

ncu runs this module once more with ``--launch``; that process launches every kernel once to compile
it, then once between the profiler's start and stop. ncu empties the caches before each launch, and
the clocks are left alone.
"""

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.table import Table

from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernel_tools.bench.layers import BenchLayer, layer_of_shape
from svsk_kernel_tools.bench.machine import describe, open_device
from svsk_kernel_tools.bench.shapes import VARIANTS, Shape, find_shapes
from svsk_kernels.gpu.choice import choice_for
from svsk_kernels.gpu.matmul_op import gpu_of
from svsk_kernels.gpu.repack_sidecar import rows_at_a_time
from svsk_kernels.gpu.tuning import choices_for
from svsk_kernels.tile_grid import ceil_div
from svsk_offline.storage.atomic import write_json, write_text

__all__ = ["METRICS", "Profiled", "app", "parse_ncu", "rows_of"]

_KERNELS: Final = ("shrink_kernel", "decode_kernel", "gemm_kernel", "fold_kernel")

METRICS: Final = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_read_bytes": "dram__bytes_read.sum",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "stall_memory": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "stall_shared": "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "stall_barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "stall_mma": "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "stall_wait": "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
}
"""Names used here, and ncu's. Stalls are warps stalled for that reason per issued instruction."""

_UNITS: Final = {
    "": 1.0,
    "%": 1.0,
    "inst": 1.0,
    "warp": 1.0,
    "register/thread": 1.0,
    "cycle": 1.0,
    "nsecond": 1e-3,
    "ns": 1e-3,
    "usecond": 1.0,
    "us": 1.0,
    "msecond": 1e3,
    "ms": 1e3,
    "byte": 1.0,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
}
"""Factors to microseconds, bytes and counts.

A version of ncu writes either the long or the short name of a unit.
"""


@dataclass(frozen=True)
class Profiled:
    """Counters of one launch.

    Attributes:
        kernel: name of the function.
        metrics: by the keys of METRICS, in microseconds, bytes, percent and counts; what ncu could
            not read is left out.
    """

    kernel: str
    metrics: dict[str, float]


def parse_ncu(text: str) -> list[Profiled]:
    """Read what ``ncu --csv --page raw`` printed, with its messages and the program's output.

    Raises:
        BenchError: there is no table, or a unit is unknown.
    """
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise BenchError(f"ncu printed no table. Its output ends: {' / '.join(lines[-6:])[-900:]}")
    names, units, *rows = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    unit_of = dict(zip(names, units, strict=False))
    launches = []
    for row in rows:
        if len(row) != len(names):
            continue  # a message after the table
        values = dict(zip(names, row, strict=True))
        metrics = {}
        for key, metric in METRICS.items():
            number = _number(values.get(metric, ""))
            if number is not None:
                metrics[key] = number * _factor(metric, unit_of[metric])
        launches.append(Profiled(values["Kernel Name"], metrics))
    return launches


def _number(text: str) -> float | None:
    """None for an empty cell and for ``n/a``."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _factor(metric: str, unit: str) -> float:
    if unit not in _UNITS:
        raise BenchError(
            f"ncu gives {metric} in {unit!r}, expected one of {', '.join(filter(None, _UNITS))}."
        )
    return _UNITS[unit]


def rows_of(
    launched: Sequence[dict[str, Any]], profiled: Sequence[Profiled]
) -> list[dict[str, Any]]:
    """What was launched beside its counters.

    Args:
        launched: records of the process that was profiled, in order; each says which ``kernels`` it
            launched.
        profiled: launches that ncu saw, in order.

    Returns:
        One record a launch, with ``instructions_per_weight``: executed instructions of all threads
        over N K.

    Raises:
        BenchError: they are not the same launches.
    """
    expected = [name for record in launched for name in record["kernels"]]
    seen = [launch.kernel for launch in profiled]
    if expected != seen:
        raise BenchError(
            f"ncu saw the kernels {seen}, but {expected} were launched. Update the list in"
            " profile.py."
        )
    left, rows = iter(profiled), []
    for record in launched:
        for _ in record["kernels"]:
            launch = next(left)
            row = {key: value for key, value in record.items() if key != "kernels"} | asdict(launch)
            if "instructions" in launch.metrics:
                row["instructions_per_weight"] = (
                    launch.metrics["instructions"] * 32 / (record["n"] * record["k"])
                )
            rows.append(row)
    return rows


def _launch(shapes: Sequence[Shape], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Launch each shape's layer at each number of tokens, first unseen, then under the profiler."""
    device = open_device("cuda")
    variant = VARIANTS[0]
    for shape in shapes:
        layer = layer_of_shape(shape, variant, torch.bfloat16, device).without_linears()
        for m in tokens:
            x = torch.randn(m, shape.k, device=device).to(torch.bfloat16)
            layer.dispatched(x)
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
            layer.dispatched(x)
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
            yield {
                "shape": shape.name,
                "n": shape.n,
                "k": shape.k,
                "m": m,
                "variant": variant.label,
                "kernels": _kernels(layer, m),
            }


def _kernels(layer: BenchLayer, m: int) -> list[str]:
    """Our kernels that a product of ``m`` tokens launches; cuBLAS's are not looked at."""
    spec = layer.spec
    gpu = gpu_of(layer.base.words.device)
    choice = choice_for(choices_for(gpu, spec.n, spec.k, spec.group_size, spec.row_scaled), m)
    if choice.kernel == "fold":
        return ["fold_kernel"] * ceil_div(spec.n, rows_at_a_time(spec.k, spec.dtype.itemsize))
    return ["shrink_kernel", f"{choice.kernel}_kernel"]


def _profile(shapes: Sequence[Shape], tokens: Sequence[int], text: Path) -> list[dict[str, Any]]:
    """Run ncu, keep what it printed in ``text``, and read it."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise BenchError(
            "ncu is not on the PATH. Install NVIDIA Nsight Compute, it comes with the CUDA toolkit."
        )
    command = [
        ncu,
        "--clock-control",
        "none",
        "--print-units",
        "base",
        "--csv",
        "--page",
        "raw",
        "--profile-from-start",
        "off",
    ]
    command += ["-k", f"regex:^({'|'.join(_KERNELS)})$", "--metrics", ",".join(METRICS.values())]
    command += [sys.executable, "-m", "svsk_kernel_tools.bench.profile", "--launch"]
    command += [f"--shape={shape.name}" for shape in shapes] + [f"--tokens={m}" for m in tokens]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    output = run.stdout + run.stderr
    text.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, output)
    if run.returncode:
        raise BenchError(f"ncu ended with {run.returncode}: {output[-1500:]}")
    launched = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"shape"')]
    return rows_of(launched, parse_ncu(run.stdout))


def _print(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    shown = ("us", "dram_percent", "issue_percent", "warps_percent", "bank_conflicts", "registers")
    table = Table(
        "shape", "M", "kernel", *shown, "instr/weight", "stalls: memory, shared, barrier, mma, wait"
    )
    for row in rows:
        metrics = row["metrics"]
        stalls = ("stall_memory", "stall_shared", "stall_barrier", "stall_mma", "stall_wait")
        table.add_row(
            row["shape"],
            str(row["m"]),
            row["kernel"],
            *(f"{metrics[key]:.1f}" if key in metrics else "-" for key in shown),
            f"{row['instructions_per_weight']:.2f}" if "instructions_per_weight" in row else "-",
            ", ".join(f"{metrics[key]:.2f}" if key in metrics else "-" for key in stalls),
        )
    console.print(table)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    shape: Annotated[
        list[str] | None, typer.Option(help="Name of a shape; repeat for several.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of tokens; repeat for several.")
    ] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Write the counters there.")] = Path(
        "svsk_profile.json"
    ),
    launch: Annotated[bool, typer.Option("--launch", hidden=True)] = False,
) -> None:
    """Read hardware counters of the kernels that are dispatched.

    Exits with 2 if that cannot be done.
    """
    try:
        shapes = find_shapes(shape or ["qwen3-4b.gate_up", "qwen3-4b.down", "qwen3-4b.o"])
        counts = tokens or [1, 16, 128, 2048]
        if launch:
            for record in _launch(shapes, counts):
                print(json.dumps(record), flush=True)
            return
        machine = describe(open_device("cuda")) | {
            "command": " ".join(("python -m svsk_kernel_tools.bench.profile", *sys.argv[1:]))
        }
        rows = _profile(shapes, counts, json_file.with_suffix(".ncu.txt"))
    except BenchError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(2) from error
    write_json(json_file, {"machine": machine, "launches": rows})
    _print(Console(width=200), rows)


if __name__ == "__main__":
    app()
