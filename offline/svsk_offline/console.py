# SPDX-License-Identifier: Apache-2.0
"""What a quantisation shows while it runs."""

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from svsk_offline.pipeline import Progress as Callbacks
from svsk_offline.pipeline import QuantizationResult, quantize, resolve_device
from svsk_offline.recipe import Recipe
from svsk_offline.storage.inspection import whole_bits_per_weight
from svsk_offline.storage.layer_report import LayerReport

__all__ = ["peak_gpu_memory_gib", "peak_memory_gib", "quantize_with_progress"]


def peak_memory_gib() -> float:
    """Largest resident size of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def peak_gpu_memory_gib(device: torch.device) -> float | None:
    """Most memory that tensors of this process took on a GPU so far, in GiB; None off a GPU."""
    return torch.cuda.max_memory_allocated(device) / (1 << 30) if device.type == "cuda" else None


def quantize_with_progress(
    console: Console, model: str | Path, out: Path, recipe: Recipe, **options: Any
) -> QuantizationResult:
    """Run :func:`svsk_offline.pipeline.quantize` with a bar, a line per matrix and a summary."""
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("blocks", total=None)

        def layer(report: LayerReport) -> None:
            console.print(_layer_line(report), markup=False)

        callbacks = Callbacks(
            message=lambda text: console.print(text, markup=False),
            block=lambda index, total: bar.update(task, completed=index, total=total),
            layer=layer,
        )
        result = quantize(model, out, recipe, progress=callbacks, **options)
    seconds = time.perf_counter() - started
    gpu = peak_gpu_memory_gib(resolve_device(options.get("device", "auto")))
    console.print(
        f"wrote {result.folder}: {len(result.layers)} matrices, {result.bits_per_weight:.4f} bits"
        f" per weight ({whole_bits_per_weight(result.folder):.4f} over all weights of the model),"
        f" {seconds:.1f} s ({statistics.median(result.block_seconds):.2f} s per block),"
        f" peak memory {peak_memory_gib():.2f} GiB"
        + ("" if gpu is None else f", of the GPU {gpu:.2f} GiB")
    )
    return result


def _layer_line(report: LayerReport) -> str:
    n, k = report.shape
    where = "" if report.held_out_tokens else " (of fitted tokens)"
    return (
        f"{report.name:<44} {n:>6} x {k:<6} {report.bits_per_weight:6.3f} bpw  output error"
        f" {report.base_error:.2e} -> {report.error:.2e}{where}  sqnr {report.sqnr_db:5.1f} dB "
        f" {report.seconds:5.2f} s"
    )
