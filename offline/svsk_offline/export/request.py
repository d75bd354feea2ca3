# SPDX-License-Identifier: Apache-2.0
"""What ``svsk export`` is asked for: refused at once where it can be, else carried out."""

from collections.abc import Callable
from pathlib import Path

from svsk_offline.export.formats import ExportFormat
from svsk_offline.preflight import check_output

__all__ = ["check_request", "run"]


def check_request(
    kind: ExportFormat,
    checkpoint: Path,
    out: Path,
    *,
    overwrite: bool,
) -> None:
    """Refuse what needs no look into the checkpoint. Imports nothing heavy.

    Raises:
        SvskError: a file or folder cannot be written, an option does not go with the format, or a
            package is missing.
    """
    check_output(out, overwrite=overwrite, dense=True, source=checkpoint)


def run(
    kind: ExportFormat,
    checkpoint: Path,
    out: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write the export, after :func:`check_request`.

    Returns:
        What was written.

    Raises:
        SvskError: the format cannot hold the checkpoint, or the checkpoint is damaged.
    """
    if kind.name == "compressed-tensors":
        from svsk_offline.export.compressed_tensors import export_compressed_tensors

        return [export_compressed_tensors(checkpoint, out, overwrite=overwrite, say=say)]
    from svsk_offline.export.dense import restore

    return [restore(checkpoint, out, overwrite=overwrite, say=say)]
