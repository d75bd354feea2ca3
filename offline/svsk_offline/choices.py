# SPDX-License-Identifier: Apache-2.0
"""Values of options that are one of a few: refused at once, with what may have been meant."""

import re
from collections.abc import Collection
from typing import Final

from svsk_kernels.errors import SvskError

__all__ = [
    "BUDGET_PARTS",
    "CODEBOOKS",
    "DEVICES",
    "EMBEDDINGS",
    "FACTOR_BITS",
    "GROUP_SIZES",
    "HEADS",
    "SCALE_BITS",
    "STORED_DTYPES",
    "budget_bytes",
    "check_device",
    "choose",
    "did_you_mean",
]

DEVICES: Final = ("auto", "cpu", "cuda", "mps", "xpu")
STORED_DTYPES: Final = ("auto", "bfloat16", "float16")
CODEBOOKS: Final = ("int4", "quad8")
GROUP_SIZES: Final = (16, 32, 64)
SCALE_BITS: Final = (16, 8, 6)
FACTOR_BITS: Final = (8, 4)
HEADS: Final = ("auto", "int8", "mixed-int8", "svsk", "dense")
EMBEDDINGS: Final = ("auto", "int8", "mixed-int8", "dense")
BUDGET_PARTS: Final = ("head",)


def did_you_mean(value: str, names: Collection[str]) -> str:
    """`` Did you mean X?``, or nothing where no name is close."""
    import difflib  # only where something is wrong

    close = difflib.get_close_matches(value, [*names], 1)
    return f" Did you mean {close[0]}?" if close else ""


def choose(option: str, value: str | int | None, choices: Collection[str | int]) -> None:
    """Refuse a value that is none of the choices; None, an option that was not given, passes.

    Raises:
        SvskError: it is none of them; the nearest one is named.
    """
    if value is None or value in choices:
        return
    names = [str(choice) for choice in choices]
    raise SvskError(
        f"{option} {value}: expected one of these: {', '.join(names)}."
        f"{did_you_mean(str(value), names)}"
    )


def check_device(name: str) -> None:
    """Refuse what torch cannot know as a device, without torch.

    Raises:
        SvskError: it is no name of a device, with or without a number.
    """
    kind, colon, number = name.partition(":")
    if kind not in DEVICES or (colon and not re.fullmatch(r"\d+", number)):
        raise SvskError(
            f"--device {name}: not usable here: expected one of {', '.join(DEVICES)}, or cuda:1"
            f" and the like.{did_you_mean(kind, DEVICES)}"
        )


def budget_bytes(option: str, value: float | None, unit: str, size: int) -> int | None:
    """Bytes of a budget; None where none was given.

    Args:
        option: that gave it.
        value: in its unit.
        unit: its name.
        size: bytes of it.

    Raises:
        SvskError: it is not above 0, or not finite.
    """
    if value is None:
        return None
    if not 0 < value < 1e9:
        raise SvskError(f"{option} {value:g}: expected a number of {unit} above 0.")
    return int(value * size)
