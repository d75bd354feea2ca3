# SPDX-License-Identifier: Apache-2.0
"""Predicted times of the kernels on GPUs: ``python -m svsk_kernel_tools.bench.predict``.

Nothing is measured, and no GPU is needed. For each layer and number of tokens: which kernel the
rule chooses and how long it is predicted to take, beside rooflines of cuBLAS in bfloat16 and of
Marlin; and for each format of scales, what decoding one token takes more than with groups of 64.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernel_tools.bench.report import table
from svsk_kernel_tools.bench.shapes import SHAPES, Shape, by_name
from svsk_kernels.gpu.choice import GROUP_SIZES, Choice, choice_for
from svsk_kernels.gpu.predicted_time import (
    GPUS,
    Layer,
    Sidecar,
    Speeds,
    dense_time,
    instructions_per_weight,
    marlin_time,
    predicted_time,
)
from svsk_kernels.gpu.rule import heuristic_choices

__all__ = ["Row", "app", "layer_of", "markdown", "predict", "scale_rows"]

TOKENS: Final = (1, 4, 16, 32, 64, 65, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Numbers of tokens of a table."""

LAYERS: Final = {
    "base": Layer(0, 0),
    "fast": Layer(0, 0, 32, row_scaled=True, quad8=True, sidecar=Sidecar(32, 4)),
}
"""How layers are quantised: int4 with groups of 64 alone; the recipe ``fast``."""

_SLOWER: Final = 1.1

_HEADINGS: Final = ("layer", "M", "kernel", "us", "cuBLAS us", "Marlin us", "of cuBLAS")


@dataclass(frozen=True)
class Row:
    """One prediction; times in microseconds."""

    gpu: str
    shape: str
    m: int
    choice: Choice
    ours: float
    dense: float
    marlin: float

    @property
    def ratio(self) -> float:
        """Of cuBLAS's time."""
        return self.ours / self.dense

    @property
    def kernel(self) -> str:
        """Kernel, and where it has any, rows and tokens of a block and parts of the columns."""
        choice = self.choice
        if choice.kernel == "fold":
            return "fold"
        parts = f" / {choice.split_k}" if choice.split_k > 1 else ""
        return f"{choice.kernel} {choice.block_n} x {choice.block_m}{parts}"


def layer_of(shape: Shape, kind: str) -> Layer:
    """A shape, quantised as one of :data:`LAYERS`."""
    return replace(LAYERS[kind], n=shape.n, k=shape.k)


def predict(
    gpus: Iterable[str], shapes: Sequence[Shape], tokens: Sequence[int], kind: str = "base"
) -> list[Row]:
    """What the rule chooses, and how long all take."""
    rows = []
    for name in gpus:
        speeds = GPUS[name]
        for shape in shapes:
            layer = layer_of(shape, kind)
            choices = heuristic_choices(
                speeds.gpu, shape.n, shape.k, layer.group_size, layer.row_scaled
            )
            for m in tokens:
                choice = choice_for(choices, m)
                seconds = (
                    predicted_time(speeds, layer, choice, m),
                    dense_time(speeds, shape.n, shape.k, m),
                    marlin_time(speeds, shape.n, shape.k, m),
                )
                rows.append(Row(name, shape.name, m, choice, *(1e6 * value for value in seconds)))
    return rows


def scale_rows(gpus: Iterable[str], shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """Instructions per weight and time of one token, all shapes together, by format of scales.

    ``more`` is the share of time beyond that with groups of 64 of the same codebook and levels.
    """
    rows = []
    for name in gpus:
        speeds = GPUS[name]
        for quad8 in (False, True):
            for row_scaled in (False, True):
                layers = {
                    size: Layer(0, 0, size, row_scaled, quad8) for size in reversed(GROUP_SIZES)
                }
                times = {size: _token(speeds, layer, shapes) for size, layer in layers.items()}
                rows += [
                    {
                        "gpu": name,
                        "codebook": "quad8" if quad8 else "int4",
                        "levels": 2 if row_scaled else 1,
                        "group_size": size,
                        "instructions_per_weight": instructions_per_weight(
                            speeds.gpu.capability, Choice("decode"), size, row_scaled, quad8
                        ),
                        "us": 1e6 * times[size],
                        "more": times[size] / times[64] - 1,
                    }
                    for size in layers
                ]
    return rows


def _token(speeds: Speeds, kind: Layer, shapes: Sequence[Shape]) -> float:
    """Seconds of one token in all layers."""
    layers = [replace(kind, n=shape.n, k=shape.k) for shape in shapes]
    return sum(
        predicted_time(
            speeds,
            layer,
            heuristic_choices(speeds.gpu, layer.n, layer.k, layer.group_size, layer.row_scaled)[0],
            1,
        )
        for layer in layers
    )


def _cells(row: Row) -> list[str]:
    times = (f"{value:.1f}" for value in (row.ours, row.dense, row.marlin))
    return [row.shape, str(row.m), row.kernel, *times, f"{row.ratio:.2f}"]


def markdown(rows: Sequence[Row], scales: Sequence[dict[str, Any]]) -> list[str]:
    """Both tables: a cell for each prediction, GPU by GPU, and a row for each format of scales."""
    lines = []
    counts = list(dict.fromkeys(row.m for row in rows))
    for name in dict.fromkeys(row.gpu for row in rows):
        of_gpu = [row for row in rows if row.gpu == name]
        cells = [
            [shape, *(_cell(row) for row in of_gpu if row.shape == shape)]
            for shape in dict.fromkeys(row.shape for row in of_gpu)
        ]
        lines += [f"**{name}:**", "", *table(cells, ("layer", *map(str, counts))), ""]
    gpus = dict.fromkeys(row["gpu"] for row in scales)
    headings = ("codebook", "levels", "groups", *gpus)
    return [*lines, "**One token, scales:**", "", *table(_scale_cells(scales), headings)]


def _cell(row: Row) -> str:
    """Three times; bold where this kernel's is more than a tenth over cuBLAS's."""
    times = " / ".join(f"{value:.1f}" for value in (row.ours, row.dense, row.marlin))
    return f"**{times}**" if row.ratio > _SLOWER else times


def _scale_cells(scales: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each format, a column for each GPU."""
    formats = dict.fromkeys((row["codebook"], row["levels"], row["group_size"]) for row in scales)
    return [
        [
            *map(str, kind),
            *(
                f"{row['instructions_per_weight']:.2f}, {row['us']:.1f} us, {row['more']:+.0%}"
                for row in scales
                if (row["codebook"], row["levels"], row["group_size"]) == kind
            ),
        ]
        for kind in formats
    ]


def main(
    gpu: Annotated[
        list[str] | None, typer.Option(help="A100, ...; repeat for several, all without.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Name of a layer; repeat for several, all without.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, M.")] = ",".join(map(str, TOKENS)),
    layer: Annotated[
        str, typer.Option(help="base: int4, groups of 64, no sidecar; fast: as the recipe does.")
    ] = "base",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the predictions there.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Also write tables in Markdown there.")
    ] = None,
) -> None:
    """Predict times of the kernels on GPUs that need not be here. Nothing is measured."""
    try:
        gpus = by_name("--gpu", {name: name for name in GPUS}, gpu or (), ", ")
        shapes = by_name("--shape", {one.name: one for one in SHAPES}, shape or (), ", ")
        (kind,) = by_name("--layer", {name: name for name in LAYERS}, [layer], ", ")
        counts = _counts(tokens)
    except BenchError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(2) from error
    rows, scales = predict(gpus, shapes, counts, kind), scale_rows(gpus, shapes)
    console = Console()
    shown = Table("GPU", *_HEADINGS, box=None, padding=(0, 1))
    for row in rows:
        shown.add_row(row.gpu, *_cells(row))
    console.print(shown)
    console.print("Predicted, not measured: svsk_kernels/gpu/predicted_time.py says how.")
    if json_file:
        document = {
            "date": date.today().isoformat(),
            "measured": False,
            "layer": kind,
            "times": [asdict(row) | {"ratio": row.ratio} for row in rows],
            "scales": scales,
        }
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if markdown_file:
        markdown_file.write_text("\n".join(markdown(rows, scales)) + "\n", encoding="utf-8")


def _counts(text: str) -> list[int]:
    """Numbers of tokens.

    Raises:
        BenchError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise BenchError(f"--tokens {text}: expected numbers from 1 on, such as 1,64,512.")
    return [int(part) for part in parts]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
