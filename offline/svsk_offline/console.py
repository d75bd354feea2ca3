# SPDX-License-Identifier: Apache-2.0
"""What a quantisation shows while it runs, and what it says at the end."""

import shlex
import statistics
import time
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from svsk_offline.calibration.room import peak_memory_gib
from svsk_offline.pipeline import Progress as Callbacks
from svsk_offline.pipeline import QuantizationResult, quantize, resolve_device
from svsk_offline.recipe import Recipe
from svsk_offline.storage.decode_cost import finer_groups, finer_groups_line
from svsk_offline.storage.inspection import whole_bits_per_weight
from svsk_offline.storage.layer_report import LayerReport
from svsk_offline.terminal import duration, steps

__all__ = ["peak_gpu_memory_gib", "quantize_with_progress", "summary"]

_WORST: Final = 5


def peak_gpu_memory_gib(device: torch.device) -> float | None:
    """Most memory that tensors of this process took on a GPU so far, in GiB; None off a GPU."""
    return torch.cuda.max_memory_allocated(device) / (1 << 30) if device.type == "cuda" else None


def quantize_with_progress(
    console: Console,
    model: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    notes: Console | None = None,
    reference: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run :func:`svsk_offline.pipeline.quantize` with a bar, a line per matrix and a summary.

    Args:
        console: where the summary is shown.
        model: folder or hub name.
        out: folder to write.
        recipe: how.
        notes: where the bar and the lines on the way are shown; ``console`` if None.
        reference: what the model is called in the commands that the summary names.
        options: further ones of ``quantize``.

    Returns:
        The figures of the summary and of every matrix, JSON-ready.
    """
    notes = console if notes is None else notes
    started = time.perf_counter()
    with steps(notes, "opening the model") as bar:

        def layer(report: LayerReport) -> None:
            # On a terminal cut rather than wrapped: a second line would tear the bar.
            cut = notes.is_terminal
            notes.print(
                _layer_line(report),
                markup=False,
                soft_wrap=not cut,
                no_wrap=cut,
                overflow="ellipsis" if cut else None,
                crop=cut,
            )

        callbacks = Callbacks(
            message=lambda text: notes.print(text, markup=False),
            block=lambda done, total: bar.update("blocks", done, total),
            skipped=lambda done, total: bar.update("blocks", done, total, skipped=True),
            layer=layer,
        )
        result = quantize(model, out, recipe, progress=callbacks, **options)
    gpu = peak_gpu_memory_gib(resolve_device(options.get("device", "auto")))
    figures = _figures(result, time.perf_counter() - started, gpu)
    for line in summary(figures, reference or str(model)):
        console.print(line, markup=False)
    return figures


def _figures(result: QuantizationResult, seconds: float, gpu: float | None) -> dict[str, Any]:
    """What a run did, JSON-ready."""
    return {
        "folder": str(result.folder),
        "bits_per_weight": result.bits_per_weight,
        "bits_per_weight_of_all": whole_bits_per_weight(result.folder),
        "bytes": sum(path.stat().st_size for path in result.folder.iterdir() if path.is_file()),
        "seconds": seconds,
        "plan_seconds": result.plan_seconds,
        "seconds_per_block": statistics.median(result.block_seconds),
        "peak_memory_gib": peak_memory_gib(),
        "peak_gpu_memory_gib": gpu,
        "finer_groups": finer_groups(result.folder),
        "matrices": [
            {
                "name": report.name,
                "shape": list(report.shape),
                "bits_per_weight": report.bits_per_weight,
                "base_error": report.base_error,
                "error": report.error,
                "held_out_tokens": report.held_out_tokens,
                "seconds": report.seconds,
            }
            for report in (*result.layers, *result.tables)
        ],
    }


def summary(figures: dict[str, Any], reference: str) -> list[str]:
    """What is said at the end of a run, and what to type next.

    Args:
        figures: what :func:`quantize_with_progress` returns.
        reference: folder or name of the original model.
    """
    gpu = figures["peak_gpu_memory_gib"]
    matrices = figures["matrices"]
    measured = [row for row in matrices if row["error"] is not None]
    worst = sorted(measured, key=lambda row: -row["error"])[:_WORST]
    width = max((len(row["name"]) for row in worst), default=0)
    folder = shlex.quote(_short(figures["folder"]))
    slower = finer_groups_line(figures["finer_groups"])
    model = shlex.quote(reference)
    return [
        f"wrote {figures['folder']}: {len(matrices)} matrices",
        f"bits per weight {figures['bits_per_weight']:.4f} of the linears of the blocks,"
        f" {figures['bits_per_weight_of_all']:.4f} over all weights of the model;"
        f" {figures['bytes'] / 1e6:,.1f} MB",
        f"time {duration(figures['seconds'])}, of which {duration(figures['plan_seconds'])} for"
        f" measuring and {figures['seconds_per_block']:.2f} s per block",
        f"peak memory {figures['peak_memory_gib']:.2f} GiB"
        + ("" if gpu is None else f", of the GPU {gpu:.2f} GiB"),
        *([slower] if slower else []),
        "largest errors of outputs:",
        *(
            f"  {row['name']:<{width}}  {row['error']:.2e} at {row['bits_per_weight']:.2f} bits"
            for row in worst
        ),
        "next:",
        f"  svsk validate {folder}",
        f"  svsk eval {folder} --reference {model} --text HELD_OUT.txt",
        f"  vllm serve {folder} --quantization svsk",
    ]


def _short(folder: str) -> str:
    """A folder as it is reached from here, where that is shorter."""
    try:
        return str(Path(folder).relative_to(Path.cwd()))
    except ValueError:
        return folder


def _layer_line(report: LayerReport) -> str:
    n, k = report.shape
    where = "" if report.held_out_tokens else " (of fitted tokens)"
    error = "not measured: no token was routed to it"
    if report.base_error is not None and report.error is not None:
        error = f"{report.base_error:.2e} -> {report.error:.2e}{where}"
    aim = "" if report.aim_share is None else f"  aim {report.aim_share:.2f}"
    return (
        f"{report.name:<44} {n:>6} x {k:<6} {report.bits_per_weight:6.3f} bpw  output error"
        f" {error}  sqnr {report.sqnr_db:5.1f} dB{aim}  {report.seconds:5.2f} s"
    )
