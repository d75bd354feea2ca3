# SPDX-License-Identifier: Apache-2.0
"""Quantised linears as a kernel gets them."""

import torch

from svsk_kernel_tools.stack_linears import stack_linears
from svsk_kernels.layer_kernel import LayerSpec
from svsk_vllm.format import QuantizedLinear


def loaded_layer(linear: QuantizedLinear, dtype: torch.dtype) -> tuple[LayerSpec, torch.nn.Module]:
    """A whole, unfused layer after loading, before a kernel has prepared it."""
    stacked = stack_linears([linear.plain], dtype)
    return stacked.spec, stacked.module()
