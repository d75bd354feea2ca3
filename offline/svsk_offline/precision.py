# SPDX-License-Identifier: Apache-2.0
"""Float32 products in float32: what decomposes a Hessian must not be rounded to 10 bits first."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

__all__ = ["full_float32"]

_OVERRIDE: Final = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


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
