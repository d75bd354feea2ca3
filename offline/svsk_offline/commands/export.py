# SPDX-License-Identifier: Apache-2.0
"""What takes checkpoints elsewhere: ``svsk export``, ``restore`` and ``push``."""

from pathlib import Path
from typing import Annotated

import typer

from svsk_offline.cli_options import (
    JsonFile,
    Overwrite,
    Quiet,
    TrustRemoteCode,
    Verbose,
)
from svsk_offline.completion import one_of
from svsk_offline.export.formats import FORMATS
from svsk_offline.preflight import check_report_files
from svsk_offline.terminal import console, say_note, write_json

__all__ = ["export", "push", "restore"]


def export(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, or file.gguf.")],
    to: Annotated[
        str, typer.Option(help="dense, compressed-tensors or gguf.", autocompletion=one_of(FORMATS))
    ],
    template: Annotated[
        Path | None, typer.Option(help="GGUF of the same model, which gives all but the weights.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Also write the sidecars there, as a GGUF LoRA adapter.")
    ] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint for what does not read SVSK, and say what is lost."""
    from svsk_offline.export.formats import export_format
    from svsk_offline.export.request import check_request

    check_report_files(json=json_file)
    kind = export_format(to)
    check_request(kind, folder, out, template=template, lora=lora, overwrite=overwrite)
    from svsk_offline.storage.hub import check_checkpoint

    check_checkpoint(folder)
    from svsk_offline.export.request import run

    written = run(
        kind, folder, out, template=template, lora=lora, overwrite=overwrite, say=say_note
    )
    for path in written:
        console.print(f"wrote {path}", markup=False)
    say_note(f"in this format: {kind.losses}")
    write_json(
        json_file,
        {"format": kind.name, "written": [str(path) for path in written], "losses": kind.losses},
    )


def restore(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the dense model a checkpoint stands for: `svsk export --to dense`."""
    export(folder, out, "dense", overwrite=overwrite, json_file=json_file)


def push(
    folder: Annotated[Path, typer.Argument(help="SVSK checkpoint.")],
    repository: Annotated[str, typer.Argument(help="Name on the hub, owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "SVSK checkpoint",
    trust_remote_code: TrustRemoteCode = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Validate a checkpoint and upload it to the hub.

    With the token of `hf auth login`; to another hub where HF_ENDPOINT names one.
    """
    from svsk_offline.push import check_repository
    from svsk_offline.push import push as upload
    from svsk_offline.storage.hub import check_checkpoint

    check_report_files(json=json_file)
    check_checkpoint(folder)
    check_repository(repository)
    address = upload(
        folder,
        repository,
        private=private,
        message=message,
        trust_remote_code=trust_remote_code,
        note=say_note,
    )
    console.print(address, markup=False)
    write_json(json_file, {"repository": repository, "commit": address})
