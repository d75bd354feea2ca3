# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of SVSK layers: a plain reference, and the sidecar as a custom op."""

from svsk_kernels.naive import naive_matmul
from svsk_kernels.plan import Bundle, SidecarPlan, SlotGroup
from svsk_kernels.sidecar import FACTOR_STEP, factor_dtype, sidecar_matmul

__all__ = [
    "FACTOR_STEP",
    "Bundle",
    "SidecarPlan",
    "SlotGroup",
    "factor_dtype",
    "naive_matmul",
    "sidecar_matmul",
]
