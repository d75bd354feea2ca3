# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels for GPUs that are not here, and check facts read off the binaries.

``python -m svsk_kernel_tools.binary`` compiles every registered case for every target and applies
the checks. Nothing here needs a GPU or its driver; the disassemblers are the ones of Triton's
wheel.
"""
