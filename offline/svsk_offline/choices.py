# SPDX-License-Identifier: Apache-2.0
"""Values of options that are one of a few: refused at once, with what may have been meant."""

import difflib
import re
from collections.abc import Collection
from typing import Final

from svsk_kernels.errors import SvskError

__all__ = ["check_device", "choose", "did_you_mean"]

_DEVICES: Final = ("auto", "cpu", "cuda", "mps", "xpu")


def did_you_mean(value: str, names: Collection[str]) -> str:
    """`` Did you mean X?``, or nothing where no name is close."""
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
        f"{option} {value}: expected one of {', '.join(names)}.{did_you_mean(str(value), names)}"
    )


def check_device(name: str) -> None:
    """Refuse what torch cannot know as a device, without torch.

    Raises:
        SvskError: it is no name of a device, with or without a number.
    """
    kind, colon, number = name.partition(":")
    if kind not in _DEVICES or (colon and not re.fullmatch(r"\d+", number)):
        raise SvskError(
            f"--device {name}: not usable here: expected one of {', '.join(_DEVICES)}, or cuda:1"
            f" and the like.{did_you_mean(kind, _DEVICES)}"
        )
