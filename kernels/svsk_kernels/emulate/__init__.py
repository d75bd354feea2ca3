# SPDX-License-Identifier: Apache-2.0
"""Compiled Triton kernels on a CPU: their PTX, executed in NumPy and checked as it runs.

Usage::

    with emulated(capability=90, order="interleaved", late=True) as gpu:
        y = fused_matmul(x, ...)  # CPU tensors
    gpu.launches[-1].bytes_read["words"]
"""

from svsk_kernels.emulate.driver import CAPABILITIES, emulated
from svsk_kernels.emulate.errors import BarrierError, EmulateError, MemoryFaultError, RaceError, UnsupportedError
from svsk_kernels.emulate.machine import ORDERS, Gpu, Launch, Order

__all__ = [
    "CAPABILITIES",
    "ORDERS",
    "BarrierError",
    "EmulateError",
    "Gpu",
    "Launch",
    "MemoryFaultError",
    "Order",
    "RaceError",
    "UnsupportedError",
    "emulated",
]
