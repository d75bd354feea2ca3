# SPDX-License-Identifier: Apache-2.0
"""Quantised linears as a kernel gets them."""

from dataclasses import replace

import torch

from svsk_kernel_tools.stack_linears import stack_linears
from svsk_kernels.layer_kernel import LayerSpec
from svsk_vllm.format import QuantizedLinear
from svsk_vllm.format.group_scales import ONE_LEVEL, split_scales


def loaded_layer(linear: QuantizedLinear, dtype: torch.dtype) -> tuple[LayerSpec, torch.nn.Module]:
    """A whole, unfused layer after loading, before a kernel has prepared it."""
    plain, bits = linear.plain, linear.spec.scheme.weights.scale_bits
    if bits != ONE_LEVEL:
        codes, row_scale = split_scales(linear.scale, bits)
        plain = replace(plain, scale=codes, row_scale=row_scale)
    stacked = stack_linears([plain], dtype)
    return stacked.spec, stacked.module()
