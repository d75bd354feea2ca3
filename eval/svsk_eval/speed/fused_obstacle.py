# SPDX-License-Identifier: Apache-2.0
"""Why the fused kernels cannot run a checkpoint here, said before an engine is started for it."""

import torch

from svsk_kernels.cpu.cpu_kernel import CpuKernel
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.layer_kernel import LayerSpec
from svsk_vllm.format import Checkpoint, LinearSpec
from svsk_vllm.format.group_scales import ONE_LEVEL

__all__ = ["fused_obstacle"]


def fused_obstacle(checkpoint: Checkpoint, device: torch.device | None = None) -> str | None:
    """Why a linear of a checkpoint has no fused kernel on a device.

    Sidecars and how vLLM fuses and shards linears do not matter to it, but for the columns of a
    rank under tensor parallelism, which are not looked at.

    Args:
        checkpoint: what is to be served.
        device: where; None is the first CUDA device if there is one, else the CPU.

    Returns:
        The linear and the reason, or None where all have one. On a CPU the kernel may be compiled.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked: set[LayerSpec] = set()
    for name, spec in checkpoint.linears.items():
        layer = _layer(spec)
        if layer in asked:
            continue
        asked.add(layer)
        reason = (
            CpuKernel.obstacle(layer)
            if device.type == "cpu"
            else TritonKernel.obstacle(layer, device)
        )
        if reason:
            return f"{name}: {reason}"
    return None


def _layer(spec: LinearSpec) -> LayerSpec:
    """The base of a linear as vLLM holds it; a float32 checkpoint is served in 16 bits."""
    weights = spec.scheme.weights
    dtype = torch.bfloat16 if spec.scale_dtype == torch.float32 else spec.scale_dtype
    return LayerSpec(
        spec.n,
        spec.k,
        weights.group_size,
        weights.codebook,
        dtype,
        row_scaled=weights.scale_bits != ONE_LEVEL,
    )
