# SPDX-License-Identifier: Apache-2.0
"""Options that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = [
    "CalibrationText",
    "ChatTemplate",
    "CodebookName",
    "Device",
    "JsonFile",
    "Overwrite",
    "Samples",
    "Seed",
    "SeqLen",
    "StoredDtype",
    "TileM",
    "TileN",
    "TrustRemoteCode",
    "console",
    "write_json",
]

console = Console(soft_wrap=True, highlight=False)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
TileM = Annotated[int | None, typer.Option(help="Rows of a tile, 0 for all.")]
TileN = Annotated[int | None, typer.Option(help="Columns of a tile, 0 for all.")]
CodebookName = Annotated[str | None, typer.Option(help="int4 or quad8.")]
CalibrationText = Annotated[
    list[str] | None,
    typer.Option(
        help="File (text, JSON lines or list, parquet), dataset name[:config]:split, or"
        " default (if none is given), python, prose, code, chat, arithmetic. Several may be given,"
        " each with its weight: FILE:0.7.",
    ),
]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Render Q/A rows as chat.")]
Samples = Annotated[
    int | None,
    typer.Option(help="Calibration samples; as many as the model needs if not given."),
]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per sample.")]
Seed = Annotated[int | None, typer.Option(help="Of the draw of samples.")]
StoredDtype = Annotated[
    str, typer.Option(help="Of scales and dense tensors: auto, bfloat16, float16.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files that come with the model.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")]


def write_json(target: Path | None, value: Any) -> None:
    """Write the figures of a command to the file of ``--json``, if one was named."""
    if target is not None:
        from svsk_offline.storage.atomic import write_json as write

        write(target, value)
