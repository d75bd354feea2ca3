# SPDX-License-Identifier: Apache-2.0
"""Compiled Triton kernels on a CPU: their PTX, executed in NumPy and checked as it runs.

Usage, with ``emulated`` of :mod:`svsk_kernel_tools.emulator.driver`::

    with emulated(capability=90, order="interleaved", late=True) as gpu:
        y = packed_matmul(x, ...)  # CPU tensors
    gpu.launches[-1].bytes_read["words"]
"""
