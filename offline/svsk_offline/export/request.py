# SPDX-License-Identifier: Apache-2.0
"""What ``svsk export`` is asked for: refused at once where it can be, else carried out."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from svsk_kernels.errors import SvskError
from svsk_offline.export.formats import ExportFormat
from svsk_offline.preflight import check_gguf_file, check_output

__all__ = ["check_request", "run"]


def check_request(
    kind: ExportFormat,
    checkpoint: Path,
    out: Path,
    *,
    template: Path | None,
    lora: Path | None,
    overwrite: bool,
) -> None:
    """Refuse what needs no look into the checkpoint. Imports nothing heavy.

    Raises:
        SvskError: a file or folder cannot be written, an option does not go with the format, or a
            package is missing.
    """
    if kind.name != "gguf":
        for option, value in (("--template", template), ("--lora", lora)):
            if value is not None:
                raise SvskError(f"{option}: goes with `--to gguf` only. Leave it out.")
        check_output(out, overwrite=overwrite, dense=True, source=checkpoint)
        return
    check_gguf_file("OUT", out, overwrite=overwrite)
    if lora is not None:
        check_gguf_file("--lora", lora, overwrite=overwrite)
    if template is not None and not template.is_file():
        raise SvskError(f"--template {template}: no such file. Name a GGUF file of the model.")
    named = [path.resolve() for path in (out, template, lora) if path is not None]
    if len({*named}) != len(named):
        raise SvskError(f"{out}: OUT, --template and --lora must be different files.")
    if importlib.util.find_spec("gguf") is None:
        raise SvskError("--to gguf needs the package gguf: pip install 'svsk-vllm[gguf]'.")


def run(
    kind: ExportFormat,
    checkpoint: Path,
    out: Path,
    *,
    template: Path | None = None,
    lora: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write the export, after :func:`check_request`.

    Returns:
        What was written.

    Raises:
        SvskError: the format cannot hold the checkpoint, or the checkpoint is damaged.
    """
    if kind.name == "gguf":
        from svsk_offline.export.gguf.model import export_gguf

        return export_gguf(checkpoint, out, template=template, lora=lora, say=say)
    if kind.name == "compressed-tensors":
        from svsk_offline.export.compressed_tensors import export_compressed_tensors

        return [export_compressed_tensors(checkpoint, out, overwrite=overwrite, say=say)]
    from svsk_offline.export.dense import restore

    return [restore(checkpoint, out, overwrite=overwrite, say=say)]
