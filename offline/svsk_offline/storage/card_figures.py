# SPDX-License-Identifier: Apache-2.0
"""Measured figures in the card of a checkpoint: ``svsk eval`` and ``svsk bench`` add them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from svsk_offline.printable import printable
from svsk_offline.storage.atomic import write_text
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.files import open_regular, read_json

__all__ = ["BEGIN", "END", "add_figures", "shown_name"]

BEGIN: Final = "<!-- svsk: measured -->"
END: Final = "<!-- svsk: end of measured -->"

_HEADING: Final = "## Measured"
_COLUMNS: Final = ("| what | figures |", "| --- | --- |")
_MAX_CARD: Final = 1 << 20
_ROW: Final = re.compile(r"\| (.+?) \| (.+) \|")


def shown_name(name: str) -> str:
    """A model or file as a card may name it: a hub name whole, of a path the last part."""
    return Path(name).name if Path(name).exists() or name.count("/") != 1 else name


def add_figures(folder: Path, figures: Mapping[str, str]) -> Path | None:
    """Add rows to the table of figures in the card of an SVSK checkpoint, atomically.

    Args:
        folder: the checkpoint; anything else is left as it is.
        figures: what was found by what was measured; a row of the same name is replaced.

    Returns:
        The card; None where there is nothing to add or no card of a checkpoint to add it to.

    Raises:
        OSError: it cannot be written.
    """
    card = folder / "README.md"
    if not figures or not _is_checkpoint(folder):
        return None
    try:
        with open_regular(card) as handle:
            text = handle.read(_MAX_CARD + 1).decode("utf-8", errors="strict")
    except (SvskFormatError, UnicodeDecodeError):
        return None
    if len(text) > _MAX_CARD:
        return None
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        before, inside, after = f"{text.rstrip()}\n\n", "", "\n"
    found = (match for line in inside.splitlines() if (match := _ROW.fullmatch(line)))
    rows = {row[1]: row[2] for row in found if row[0] not in _COLUMNS}
    rows |= {_cell(key): _cell(value) for key, value in figures.items()}
    table = [*_COLUMNS, *(f"| {key} | {value} |" for key, value in rows.items())]
    section = "\n".join([BEGIN, _HEADING, "", *table, END])
    write_text(card, f"{before}{section}{after}")
    return card


def _is_checkpoint(folder: Path) -> bool:
    try:
        declared = read_json(folder / "config.json").get("quantization_config")
    except SvskFormatError:
        return False
    return isinstance(declared, dict) and declared.get("quant_method") == "svsk"


def _cell(text: str) -> str:
    """One line, without what would end a cell, a comment or begin a tag."""
    line = " ".join(printable(text).split())
    return line.replace("|", "/").replace("<", "(").replace(">", ")")
