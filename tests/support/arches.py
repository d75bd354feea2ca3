# SPDX-License-Identifier: Apache-2.0
"""The targets that kernels are compiled for in tests."""

from typing import Final

import pytest

from svsk_kernel_tools.binary.aot import ARCHES

_RARE: Final = (86, 89, "gfx942")
"""Compiled with all tests only: sm_86 and sm_89 differ from sm_80 in limits alone, and nobody
serves on gfx942 yet. Each takes half a minute of a core and more."""

EVERY_ARCH: Final = [
    pytest.param(arch, marks=pytest.mark.slow if arch in _RARE else ()) for arch in ARCHES
]
