# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of SVSK layers.

A plain reference, kernels for whole layers, and the sidecar alone as a custom op.
"""

from svsk_kernels.cpu.cpu_kernel import CpuKernel, cpu_ops_obstacle
from svsk_kernels.cpu.portable_kernel import PortableKernel
from svsk_kernels.cpu.processor import (
    has_avx512,
    has_bf16_products,
    product_dtype,
    simulated_features,
)
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.layer_kernel import LayerKernel, LayerSpec, replace_parameters
from svsk_kernels.naive import naive_matmul
from svsk_kernels.reference_kernel import ReferenceKernel
from svsk_kernels.sidecar_op import prepare_sidecar, sidecar_matmul
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup

__all__ = [
    "Bundle",
    "CpuKernel",
    "LayerKernel",
    "LayerSpec",
    "PortableKernel",
    "ReferenceKernel",
    "SidecarPlan",
    "SlotGroup",
    "TritonKernel",
    "cpu_ops_obstacle",
    "has_avx512",
    "has_bf16_products",
    "naive_matmul",
    "prepare_sidecar",
    "product_dtype",
    "replace_parameters",
    "sidecar_matmul",
    "simulated_features",
]
