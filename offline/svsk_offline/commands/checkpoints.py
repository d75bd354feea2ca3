# SPDX-License-Identifier: Apache-2.0
"""What looks at checkpoints: ``svsk inspect``, ``validate`` and ``diff``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from svsk_kernels.errors import SvskError
from svsk_offline.calibration_entries import DEFAULT_SOURCE
from svsk_offline.choices import (
    check_device,
)
from svsk_offline.cli_options import (
    CalibrationText,
    Device,
    JsonFile,
    Quiet,
    TrustRemoteCode,
    Verbose,
)
from svsk_offline.preflight import check_report_files
from svsk_offline.terminal import console, write_json

__all__ = ["diff", "inspect", "validate"]


def inspect(
    folder: Annotated[
        Path, typer.Argument(help="SVSK checkpoint; with --keys any model's folder or hub name.")
    ],
    json_file: JsonFile = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="Run the model on a text instead: would a key cache of few bits lose channels?",
        ),
    ] = False,
    calibration: CalibrationText = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint holds.

    Bits per weight with every stored bit counted, sizes, recipe, producer. Or, with `--keys`, how
    far apart the channels of each layer's keys are, and what `svsk quantize --smooth-keys` would
    make of it.
    """
    from svsk_offline.storage.hub import check_checkpoint, check_model
    from svsk_offline.storage.inspection import inspect_checkpoint, print_inspection

    check_report_files(json=json_file)
    check_device(device)
    if keys:
        check_model(str(folder))
        from svsk_offline.key_inspection import inspect_keys, print_keys

        found = inspect_keys(
            str(folder),
            calibration or DEFAULT_SOURCE,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        print_keys(console, found)
        write_json(json_file, found.to_json())
        return
    if calibration or trust_remote_code or device != "auto":
        raise SvskError(
            "--calibration, --device, --trust-remote-code: no effect without --keys. Leave that"
            " out."
        )
    check_checkpoint(folder)
    inspection = inspect_checkpoint(folder)
    print_inspection(console, inspection)
    write_json(json_file, inspection)


def validate(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a checkpoint's structure and numbers.

    List every problem and exit with 1 if there is one.
    """
    from svsk_offline.storage.hub import check_checkpoint
    from svsk_offline.storage.inspection import serving_note, validate_against_architecture

    check_report_files(json=json_file)
    check_checkpoint(folder)
    left: list[str] = []
    problems = validate_against_architecture(
        folder, trust_remote_code=trust_remote_code, note=left.append
    )
    for text in left:
        console.print(f"[yellow]not checked:[/] {escape(text)}")
    note = None if problems else serving_note(folder)
    if note:
        console.print(f"[yellow]note:[/] {escape(note)}")
    write_json(
        json_file,
        {"folder": str(folder), "problems": problems, "not_checked": left, "note": note},
    )
    for problem in problems:
        console.print(f"[red]problem:[/] {escape(problem)}")
    if problems:
        console.print(f"{len(problems)} problem(s) in {folder}", markup=False)
        raise typer.Exit(1)
    console.print(f"{folder}: valid", markup=False)


def diff(
    first: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what differs between two checkpoints: config, bits, errors, tensors.

    Exit with 0 whether they differ or not; `--json` tells a script.
    """
    from svsk_offline.storage.comparison import compare_checkpoints, print_comparison
    from svsk_offline.storage.hub import check_checkpoint

    check_report_files(json=json_file)
    for folder in (first, second):
        check_checkpoint(folder)
    comparison = compare_checkpoints(first, second)
    print_comparison(console, comparison)
    write_json(json_file, comparison)
