# SPDX-License-Identifier: Apache-2.0
"""The targets that kernels are compiled for in tests."""

from typing import Any, Final

import pytest

from svsk_kernel_tools.binary.aot import ARCHES, Arch

_RARE: Final = (86, 89, "gfx942")
"""Compiled with all tests only: sm_86 and sm_89 differ from sm_80 in limits alone, and nobody
serves on gfx942 yet. Each takes half a minute of a core and more."""

IN_PART: Final = (100, 120)
"""Of whose kernels one of each kind is compiled in every run, and all of them with all tests."""


def _params(rare: tuple[Arch, ...]) -> list[Any]:
    return [pytest.param(arch, marks=pytest.mark.slow if arch in rare else ()) for arch in ARCHES]


EVERY_ARCH: Final = _params(_RARE)
EVERY_KERNEL: Final = _params((*_RARE, *IN_PART))
