# SPDX-License-Identifier: Apache-2.0
"""What the processor can do, as far as kernels and dtypes depend on it.

The environment variable ``SVSK_CPU_FEATURES``, for tests and diagnosis, makes everything here and
in the plugin choose as on a lesser processor: ``avx2`` has no AVX-512, ``avx512`` has AVX-512
without bfloat16 products. It never adds what the processor lacks, and it does not change what
PyTorch and vLLM themselves use.
"""

import os
import platform
from typing import Final

import torch

from svsk_kernels.errors import KernelError

__all__ = [
    "has_avx512",
    "has_bf16_products",
    "instructions_for",
    "product_dtype",
    "simulated_features",
]

_VARIABLE: Final = "SVSK_CPU_FEATURES"
_CHOICES: Final = ("avx2", "avx512")


def simulated_features() -> str | None:
    """The value of ``SVSK_CPU_FEATURES``; None when it is not set.

    Raises:
        KernelError: it has another value than those known.
    """
    value = os.environ.get(_VARIABLE) or None
    if value is not None and value not in _CHOICES:
        raise KernelError(f"{_VARIABLE}={value}: expected {' or '.join(_CHOICES)}, or unset it.")
    return value


def has_avx512() -> bool:
    """Whether the processor has AVX-512."""
    return simulated_features() != "avx2" and torch.cpu._is_avx512_supported()


def has_bf16_products() -> bool:
    """Whether the processor multiplies bfloat16.

    Elsewhere such a product takes 5 to 8 times that in float32.
    """
    if simulated_features() is not None:
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def instructions_for(dtype: torch.dtype) -> str:
    """The path of ``svsk::cpu_linear`` that is fastest here for activations of a dtype.

    Args:
        dtype: float32, bfloat16 or float16.
    """
    if not has_avx512():
        return "avx2"
    # Processors with bfloat16 products have VNNI, but a virtual machine may hide it.
    products = (
        simulated_features() is None
        and torch.cpu._is_avx512_bf16_supported()
        and torch.cpu._is_vnni_supported()
    )
    return "avx512_bf16" if products and dtype != torch.float32 else "avx512"


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which matrices of ``dtype`` are multiplied on a device.

    Its own where that is fast, else float32.

    A CPU has no float16 product worth the name, and a bfloat16 one only with units for it.
    """
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bf16_products())
    return torch.float32 if device.type == "cpu" and slow else dtype
