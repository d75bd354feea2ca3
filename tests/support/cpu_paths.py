# SPDX-License-Identifier: Apache-2.0
"""Paths of ``svsk::cpu_linear``, as parameters of tests, and what vLLM's own kernel needs."""

import pytest
import torch

from svsk_kernels.cpu.processor import has_avx512

__all__ = ["PATHS", "PATHS_HERE", "needs_avx512"]

_SUPPORTED = {
    "avx2": torch.cpu._is_avx2_supported(),
    "avx512": torch.cpu._is_avx512_supported(),
    "avx512_bf16": torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported(),
}

PATHS_HERE = [name for name, here in _SUPPORTED.items() if here]
"""Those that the processor runs."""

PATHS = [
    pytest.param(name, marks=pytest.mark.skipif(not here, reason=f"the processor has no {name}"))
    for name, here in _SUPPORTED.items()
]
"""All, those that it does not run being skipped."""

needs_avx512 = pytest.mark.skipif(
    not has_avx512(), reason="vLLM's 4-bit kernel for CPUs needs AVX-512"
)
