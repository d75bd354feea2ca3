# SPDX-License-Identifier: Apache-2.0
"""What is multiplied in which precision.

Float32 products are float32: what decomposes a Hessian must not be rounded to 10 bits first.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

from svsk_kernels.cpu.processor import has_bf16_products

__all__ = ["block_dtype", "exact_bfloat16", "full_float32"]

_OVERRIDE: Final = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


def block_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which a model's decoder blocks run, and their gradients are taken.

    Bfloat16, as the model will be served, where the hardware multiplies it; float32 on other CPUs.
    """
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if has_bf16_products() else torch.float32


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Multiply float32 matrices on a CPU's bfloat16 units while the context lasts.

    The factors are rounded to bfloat16 and the sums are float32, so it is exact for float32 numbers
    that came from bfloat16.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def full_float32(say: Callable[[str], None]) -> Iterator[None]:
    """Multiply float32 in float32 while the context lasts, whatever was set before.

    PyTorch may be told to round the factors to TF32 or bfloat16, by a program or, as in NVIDIA's
    containers, by an environment variable.

    Args:
        say: is told where something else was set.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    because = f" ({_OVERRIDE}={value})" if (value := os.environ.get(_OVERRIDE)) else ""
    say(
        f"PyTorch is set to multiply float32 with {before} precision{because}, that is in TF32 or"
        " bfloat16. Hessians need float32: set to highest while this run lasts."
    )
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
