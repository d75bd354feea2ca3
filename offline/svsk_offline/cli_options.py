# SPDX-License-Identifier: Apache-2.0
"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from svsk_offline.calibration_entries import BUILT_IN
from svsk_offline.choices import CODEBOOKS, DEVICES, STORED_DTYPES
from svsk_offline.completion import one_of
from svsk_offline.terminal import STDOUT, log_libraries, notes, results_to_stdout

__all__ = [
    "CalibrationText",
    "ChatTemplate",
    "CodebookName",
    "Device",
    "JsonFile",
    "Overwrite",
    "Quiet",
    "Samples",
    "Seed",
    "SeqLen",
    "StoredDtype",
    "TileM",
    "TileN",
    "TrustRemoteCode",
    "Verbose",
    "examples",
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1 ...", autocompletion=one_of(DEVICES))
]
TileM = Annotated[int | None, typer.Option(help="Rows of a tile, 0 for all.")]
TileN = Annotated[int | None, typer.Option(help="Columns of a tile, 0 for all.")]
CodebookName = Annotated[
    str | None, typer.Option(help="int4 or quad8.", autocompletion=one_of(CODEBOOKS))
]
CalibrationText = Annotated[
    list[str] | None,
    typer.Option(
        help="File (text, JSON lines or list, parquet), dataset name[:config]:split, or"
        " default (if none is given), python, prose, code, chat, arithmetic. Several may be given,"
        " each with its weight: FILE:0.7.",
        autocompletion=one_of(BUILT_IN),
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
    str,
    typer.Option(
        help="Of scales and dense tensors: auto, bfloat16, float16.",
        autocompletion=one_of(STORED_DTYPES),
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files that come with the model.")
]


def _to(value: Path | None) -> Path | None:
    if value == STDOUT:
        results_to_stdout()
    return value


def _quiet(value: bool) -> None:
    notes.quiet = value


def _verbose(value: bool) -> None:
    if value:
        log_libraries()


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=_to,
        is_eager=True,
        help="Write the figures there as JSON; - is standard output, the rest goes to standard"
        " error then.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_quiet, help="Results only: no progress, no notes."),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_verbose, help="Also what libraries log."),
]


def examples(*commands: str) -> str:
    """Worked examples for the end of a command's help; a test parses each."""
    return "\n\n".join(["Examples:", "", *(f"- `{command}`" for command in commands)])
