# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of SVSK layers: a plain reference, kernels for whole layers, and the sidecar alone as a custom op."""

from svsk_kernels.cpu import CpuKernel, cpu_ops_obstacle
from svsk_kernels.layer import LayerKernel, LayerSpec, replace_parameters
from svsk_kernels.naive import naive_matmul
from svsk_kernels.plan import Bundle, SidecarPlan, SlotGroup
from svsk_kernels.portable import PortableKernel
from svsk_kernels.processor import has_avx512, has_bf16_products, product_dtype, simulated_features
from svsk_kernels.reference import ReferenceKernel
from svsk_kernels.sidecar import prepare_sidecar, sidecar_matmul
from svsk_kernels.triton_layer import TritonKernel

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
