# SPDX-License-Identifier: Apache-2.0
"""What ``--calibration`` names: sources of text and the share of each.

Imports nothing heavy: a command looks at its entries before anything else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from svsk_kernels.errors import SvskError

__all__ = [
    "BUILT_IN",
    "DEFAULT_PARTS",
    "DEFAULT_SOURCE",
    "CalibrationEntry",
    "calibration_entries",
    "calibration_path",
    "sample_counts",
]

DEFAULT_SOURCE: Final = "default"
"""Name of the mixture that needs no download."""

DEFAULT_PARTS: Final[Mapping[str, float]] = {
    "prose": 0.35,
    "code": 0.2,
    "chat": 0.3,
    "arithmetic": 0.15,
}
"""Parts of the mixture and their shares of its samples."""

BUILT_IN: Final = (DEFAULT_SOURCE, "python", *DEFAULT_PARTS)
"""Names of text that comes with this package or with Python."""

_TEXT_SUFFIXES: Final = tuple(
    """
    .csv .gz .json .jsonl .log .md .ndjson .parquet .text .txt
    """.split()  # noqa: SIM905 - a literal would take a line for each
)

_NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class CalibrationEntry:
    """A source of calibration text.

    Attributes:
        name: a built-in text, a file, or a data set.
        share: of all samples, above 0; the shares of all entries add up to 1.
    """

    name: str
    share: float


def calibration_entries(sources: str | Sequence[str]) -> tuple[CalibrationEntry, ...]:
    """What ``--calibration`` says, given once or several times.

    An entry is a source's name, and a weight after a colon if it has one. What is there as a file
    is a file, whatever colons its name has; else what follows the last colon is the weight if it is
    a number, and belongs to the name if it is not, as in the data set ``name:config:split``.

    Args:
        sources: one entry, or some.

    Returns:
        Each source once: the shares of one that is named twice are added up.

    Raises:
        SvskError: no entry, a weight that is not above 0, weights of some entries and not of
            others, or a file that is not there.
    """
    entries = [sources] if isinstance(sources, str) else list(sources)
    if not entries:
        raise SvskError(f"--calibration: names no text. Leave it out for {DEFAULT_SOURCE}.")
    parsed = [_parse(entry) for entry in entries]
    without = [name for name, weight in parsed if weight is None]
    if without and len(without) < len(parsed):
        raise SvskError(
            f"--calibration {without[0]}: has no weight, others have one. Expected {without[0]}:1"
            " or another number above 0 after each of them, or after none for equal shares."
        )
    total = sum(1 if weight is None else weight for _, weight in parsed)
    shares: dict[str, float] = {}
    for name, weight in parsed:
        shares[name] = shares.get(name, 0.0) + (1 if weight is None else weight) / total
    return tuple(CalibrationEntry(name, share) for name, share in shares.items())


def _parse(entry: str) -> tuple[str, float | None]:
    """Name and weight of an entry, whose file, if it names one, is there."""
    if not entry.strip():
        raise SvskError(
            "--calibration: an entry is empty. Expected a file, a data set, or one of"
            f" {', '.join(BUILT_IN)}."
        )
    name, colon, end = entry.rpartition(":")
    if not colon or entry in BUILT_IN or Path(entry).expanduser().exists():
        calibration_path(entry)
        return entry, None
    if not _NUMBER.fullmatch(end.strip()):
        if Path(name).expanduser().is_file() or name in BUILT_IN:
            raise SvskError(
                f"--calibration {entry}: expected a weight above 0 after {name}:, got {end!r}."
            )
        calibration_path(entry)
        return entry, None
    weight = float(end)
    if not 0 < weight < float("inf"):
        raise SvskError(f"--calibration {entry}: weight {end}, expected a number above 0.")
    calibration_path(name)
    return name, weight


def calibration_path(name: str) -> Path | None:
    """The file that a calibration source names; None for a built-in text or a data set.

    Raises:
        SvskError: it is named like a file, but there is none.
    """
    path = Path(name).expanduser()
    if name in BUILT_IN:
        return None
    if path.exists():
        return path
    # Data sets have dots in their names too: wikimedia/wikipedia:20231101.en:train.
    if path.suffix.lower() in _TEXT_SUFFIXES or name.startswith((".", "/", "~")):
        raise SvskError(f"Calibration text {path}: no such file.")
    return None


def sample_counts(shares: Sequence[float], samples: int, least: int = 0) -> list[int]:
    """Divide samples by shares: largest remainders are rounded up, the first ones of equal ones.

    Args:
        shares: above 0; they add up to 1.
        samples: at least ``least`` per share.
        least: samples that every share gets.

    Returns:
        Counts that add up to ``samples``.
    """
    exact = [share * samples for share in shares]
    counts = [max(least, int(number)) for number in exact]
    while sum(counts) != samples:
        step = 1 if sum(counts) < samples else -1
        # Shares that were raised to `least` take from those that are furthest above their own.
        open_ones = [i for i, count in enumerate(counts) if step > 0 or count > least]
        chosen = max(open_ones, key=lambda i: step * (exact[i] - counts[i]))
        counts[chosen] += step
    return counts
