# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a layer on which device."""

import logging
import os
from functools import lru_cache

import torch
from vllm.config import get_current_vllm_config

from svsk_kernels import CpuKernel, LayerKernel, LayerSpec, ReferenceKernel, TritonKernel, cpu_ops_obstacle
from svsk_vllm.format import SvskFormatError
from svsk_vllm.plugin.separate import SeparateKernel

__all__ = ["choose_kernel"]

_VARIABLE = "SVSK_KERNEL"
_KEY = "svsk_kernels"
_CHOICES = ("auto", "fused", "split", "reference")
_logger = logging.getLogger("vllm.svsk")  # vLLM shows what is logged below its own name


def choose_kernel(prefix: str, spec: LayerSpec, full_shape: tuple[int, int], device: torch.device) -> LayerKernel:
    """The device's own kernel, or another that was asked for.

    The environment variable ``SVSK_KERNEL`` decides: ``fused`` is base and sidecar in one, ``split`` the base through
    vLLM's own 4-bit kernel and the sidecar after it, ``reference`` the dequantised weight. ``auto``, the default, is
    fused where that can run and split elsewhere.

    Args:
        prefix: the layer's name, for errors.
        spec: the layer as this process holds it.
        full_shape: N and K of the layer over all tensor-parallel ranks.
        device: where the layer runs.

    Raises:
        SvskFormatError: no kernel takes the layer, or not the one asked for, or the variable has another value.
    """
    wanted = os.environ.get(_VARIABLE, "auto")
    if wanted not in _CHOICES:
        raise SvskFormatError(f"{_VARIABLE}={wanted}: expected one of {', '.join(_CHOICES)}.")
    kernel = _choose(wanted, prefix, spec, full_shape, device)
    _tell_compiler(kernel)
    return kernel


def _choose(
    wanted: str, prefix: str, spec: LayerSpec, full_shape: tuple[int, int], device: torch.device
) -> LayerKernel:
    if wanted == "reference":
        _note(spec.n, spec.k, "the dequantised weight", "")
        return ReferenceKernel(spec)
    obstacle = ""
    if wanted != "split":
        obstacle = (cpu_ops_obstacle() if device.type == "cpu" else TritonKernel.obstacle(spec, device)) or ""
        if not obstacle:
            _note(spec.n, spec.k, f"the {'CPU' if device.type == 'cpu' else 'Triton'} kernel", "")
            return CpuKernel(spec) if device.type == "cpu" else TritonKernel(spec, device)
        if wanted == "fused":
            raise SvskFormatError(f"{prefix}: {_VARIABLE}=fused, but {obstacle}. Unset it, or set it to split.")
    kernel = SeparateKernel(prefix, spec, full_shape, device)
    _note(spec.n, spec.k, f"{type(kernel.base).__name__} and a sidecar apart", obstacle)
    return kernel


def _tell_compiler(kernel: LayerKernel) -> None:
    """Make the kernel part of what vLLM keys its compiled graphs by: they call its op with its own tensors."""
    extra = get_current_vllm_config().additional_config
    if isinstance(extra, dict):
        extra[_KEY] = sorted({*extra.get(_KEY, ()), *_kernel_names(kernel)})


def _kernel_names(kernel: LayerKernel) -> list[str]:
    """Names of the kernel's class and of vLLM's kernel in it."""
    base = getattr(kernel, "base", None)
    return [type(part).__name__ for part in (kernel, base) if part is not None]


@lru_cache(maxsize=1024)
def _note(n: int, k: int, kernel: str, obstacle: str) -> None:
    """Log once what layers of a shape run on."""
    if obstacle:
        _logger.warning("SVSK layers of %d x %d run on %s, which is slower: %s", n, k, kernel, obstacle)
    else:
        _logger.info("SVSK layers of %d x %d run on %s", n, k, kernel)
