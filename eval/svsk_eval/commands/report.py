# SPDX-License-Identifier: Apache-2.0
"""``svsk report``."""

from pathlib import Path
from typing import Annotated

import typer

from svsk_eval.choices import DTYPES
from svsk_eval.commands.options import Chunks, check_models
from svsk_offline.choices import check_device, choose
from svsk_offline.cli_options import (
    Device,
    JsonFile,
    Quiet,
    TrustRemoteCode,
    Verbose,
)
from svsk_offline.completion import one_of
from svsk_offline.preflight import (
    check_page_file,
    check_report_files,
    check_text,
)
from svsk_offline.terminal import console, notes, write_json

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the report there, one page with plots.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Dense model it was made from, for KL on --text.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Plain text to score.")] = None,
    chunks: Chunks = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per chunk.")] = 512,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Arithmetic: auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16.",
            autocompletion=one_of(DTYPES),
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the page if it exists.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show where a checkpoint's bits went, what each matrix loses, and what could be better.

    With a reference and a text also KL by position and by kind of token. Without, no tensor is
    read.
    """
    from svsk_offline.storage.hub import check_checkpoint

    check_report_files(json=json_file)
    if html is not None:
        check_page_file(html, overwrite=overwrite)
    check_device(device)
    choose("--dtype", dtype, DTYPES)
    check_checkpoint(folder)
    from svsk_eval.checkpoint.command import check_options, report_checkpoint

    check_options(reference=reference, text=text, html=html)
    request = None
    if text is not None:
        check_text(text)
        check_models(reference)
        from svsk_eval.text.request import TextRequest

        request = TextRequest(
            model=str(folder),
            reference=reference,
            text=text,
            chunks=chunks,
            seq_len=seq_len,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    figures = report_checkpoint(console, folder, html=html, request=request, notes=notes)
    write_json(json_file, figures)
