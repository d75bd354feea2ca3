# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a layer on which device."""

import logging
import os
from functools import lru_cache

import torch

from svsk_kernels import CpuKernel, LayerKernel, LayerSpec, cpu_ops_obstacle
from svsk_vllm.format import SvskFormatError
from svsk_vllm.plugin.separate import SeparateKernel

__all__ = ["choose_kernel"]

_VARIABLE = "SVSK_KERNEL"
_logger = logging.getLogger(__name__)


def choose_kernel(prefix: str, spec: LayerSpec, full_shape: tuple[int, int], device: torch.device) -> LayerKernel:
    """The device's own kernel, or base and sidecar apart through vLLM's kernel for the base.

    The environment variable ``SVSK_KERNEL`` decides: ``auto`` (default), ``separate``, or ``cpu``, which is an error
    where it cannot run.

    Args:
        prefix: the layer's name, for errors.
        spec: the layer as this process holds it.
        full_shape: N and K of the layer over all tensor-parallel ranks.
        device: where the layer runs.

    Raises:
        SvskFormatError: no kernel takes the layer, or the variable has another value.
    """
    wanted = os.environ.get(_VARIABLE, "auto")
    if wanted not in ("auto", "separate", "cpu"):
        raise SvskFormatError(f"{_VARIABLE}={wanted}: expected auto, separate or cpu.")
    if wanted == "separate":
        return SeparateKernel(prefix, spec, full_shape, device)
    obstacle = cpu_ops_obstacle() if device.type == "cpu" else f"the device is {device.type}"
    if obstacle is None:
        return CpuKernel(spec)
    if wanted == "cpu":
        raise SvskFormatError(f"{prefix}: {_VARIABLE}=cpu, but {obstacle}. Unset it, or set it to separate.")
    if device.type == "cpu":
        _warn(obstacle)
    return SeparateKernel(prefix, spec, full_shape, device)


@lru_cache(maxsize=1)
def _warn(obstacle: str) -> None:
    _logger.warning("SVSK layers run slower, base and sidecar apart: %s", obstacle)
