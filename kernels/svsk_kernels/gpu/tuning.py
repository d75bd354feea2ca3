# SPDX-License-Identifier: Apache-2.0
"""Which kernel takes how many tokens: tables measured per GPU, and the rule for the others."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, TypeVar

from svsk_kernels.gpu.choice import GROUP_SIZES, Choice, Gpu, TuningError, longest_step
from svsk_kernels.gpu.repack_base import plane_length
from svsk_kernels.gpu.rule import heuristic_choices

__all__ = [
    "Entry",
    "TuningTable",
    "choices_for",
    "load_table",
    "table_name",
]

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Entry:
    """Choices of one layer shape, by rising ``max_m``; the last takes any number of tokens.

    Raises:
        TuningError: the choices leave a number of tokens out, or do not fit the shape.
    """

    n: int
    k: int
    group_size: int
    choices: tuple[Choice, ...]
    row_scaled: bool = False  # scales of two levels

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise TuningError(f"group_size {self.group_size!r}: expected one of {GROUP_SIZES}")
        if type(self.row_scaled) is not bool:
            raise TuningError(f"row_scaled {self.row_scaled!r}: expected true or false")
        limits = [choice.max_m for choice in self.choices]
        rising = [limit for limit in limits[:-1] if limit is not None]
        if (
            not limits
            or limits[-1] is not None
            or len(rising) < len(limits) - 1
            or rising != sorted(set(rising))
        ):
            raise TuningError(f"max_m {limits}: expected rising numbers, and null last")
        longest = longest_step(self.k, self.group_size, self.row_scaled)
        for choice in self.choices:
            if choice.kernel != "fold" and longest % choice.step:
                raise TuningError(
                    f"step {choice.step} must divide {longest}: the plane {plane_length(self.k)},"
                    f" or with scales of one level the group {self.group_size} if that is shorter"
                )

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Entry":
        """From an entry of a table's JSON."""
        return _made(
            cls,
            {**raw, "choices": tuple(_made(Choice, choice) for choice in raw.get("choices", ()))},
        )


@dataclass(frozen=True)
class TuningTable:
    """What was measured on one GPU.

    Raises:
        TuningError: a schema of another version.
    """

    device: str
    triton: str
    entries: tuple[Entry, ...]
    schema_version: int = 1

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise TuningError(f"schema_version {self.schema_version!r}: this package reads 1")

    @classmethod
    def from_json(cls, text: str) -> "TuningTable":
        """Read what :meth:`to_json` wrote.

        Raises:
            TuningError: it is not JSON, or not a table.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise TuningError(
                f"not JSON ({error}), expected what svsk_kernel_tools wrote"
            ) from error
        if not isinstance(raw, dict):
            raise TuningError(f"holds a {type(raw).__name__}, expected a table of entries")
        return _made(cls, {**raw, "entries": tuple(map(Entry.of, raw.get("entries", ())))})

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def _made(kind: type[_Made], raw: Mapping[str, Any]) -> _Made:
    """A dataclass from JSON; a key too many or too few is an error that names it."""
    try:
        return kind(**raw)
    except TypeError as error:
        raise TuningError(
            f"{kind.__name__}: {str(error).partition(') ')[2]} (known:"
            f" {', '.join(kind.__annotations__)})"
        ) from error


def table_name(device: str) -> str:
    """File name of a GPU's table.

    Its name in lower case, other characters than letters and digits as one dash.
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@lru_cache(maxsize=32)
def load_table(device: str) -> TuningTable | None:
    """The table shipped for a GPU, or None.

    Raises:
        TuningError: the file is not a valid table.
    """
    file = resources.files("svsk_kernels") / "configs" / table_name(device)
    if not file.is_file():
        return None
    try:
        return TuningTable.from_json(file.read_text(encoding="utf-8"))
    except TuningError as error:
        raise TuningError(f"{file}: not a valid table of kernel configurations: {error}") from error


@lru_cache(maxsize=4096)
def choices_for(
    gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool = False
) -> tuple[Choice, ...]:
    """Choices for a layer of ``n`` rows and ``k`` columns: measured ones, or those of the rule."""
    table = load_table(gpu.name)
    for entry in table.entries if table else ():
        stored = (entry.n, entry.k, entry.group_size, entry.row_scaled)
        if stored == (n, k, group_size, row_scaled):
            return entry.choices
    return heuristic_choices(gpu, n, k, group_size, row_scaled)
