# SPDX-License-Identifier: Apache-2.0
"""Layers for the kernels' tests: linears with random content, stacked and repacked."""

from dataclasses import dataclass
from typing import Any

import torch

from svsk_kernel_tools.bench.layers import BenchLayer
from svsk_kernel_tools.stack_linears import StackedLinear, stack_linears
from svsk_kernels.gpu.matmul_op import SvskMatmul
from svsk_vllm.format import LinearSpec
from tests.support.format_builders import make_group, random_linear

# Triton's interpreter truncates where it converts float32 to bfloat16, which doubles the error of
# rounding.
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Layer(BenchLayer):
    """A layer in every form."""

    stacked: StackedLinear


def make_layer(k: int, dtype: torch.dtype, *parts: dict[str, Any], **common: Any) -> Layer:
    """A layer of stacked linears.

    Each part gives ``n`` and arguments of ``make_group``, ``common`` those of all.
    """
    linears = []
    for seed, part in enumerate(parts):
        arguments = {**common, **part}
        n = arguments.pop("n")
        linear = random_linear(LinearSpec(f"m.{seed}", n, k, make_group(**arguments), dtype), seed)
        linears.append(linear.plain)
    stacked = stack_linears(linears)
    matmul = SvskMatmul(stacked.spec)
    tensors = matmul.prepare(stacked.packed, stacked.scale, stacked.u, stacked.v, stacked.gain)
    return Layer(tuple(linears), matmul, tensors, stacked)


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random activations, different for every shape."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m * k)).to(dtype)
