# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a layer on which device."""

import logging
import os
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from vllm import envs
from vllm.config import get_current_vllm_config

from svsk_kernels.cpu.cpu_kernel import CpuKernel
from svsk_kernels.cpu.portable_kernel import PortableKernel
from svsk_kernels.cpu.processor import has_bf16_products, simulated_features
from svsk_kernels.gpu.int8_layer import Int8Kernel
from svsk_kernels.gpu.triton_kernel import TritonKernel
from svsk_kernels.layer_kernel import LayerKernel, LayerSpec
from svsk_kernels.reference_kernel import ReferenceKernel
from svsk_vllm.format import SvskFormatError
from svsk_vllm.plugin.split_kernel import NoBaseKernelError, SplitKernel
from svsk_vllm.version import __version__

__all__ = ["choose_kernel"]

_VARIABLE = "SVSK_KERNEL"
_INVARIANT = "VLLM_BATCH_INVARIANT"
_ACTIVATIONS = "SVSK_ACTIVATIONS"
_SECTION = "svsk"
_KEY = "svsk_kernels"
_VERSION_KEY = "svsk_version"
_NAMES = ("auto", "fused", "split", "portable", "reference")
_logger = logging.getLogger("vllm.svsk")  # vLLM shows what is logged below its own name
_warned: set[str] = set()  # kernels that a warning has been logged about


def choose_kernel(
    prefix: str,
    spec: LayerSpec,
    full_shape: tuple[int, int],
    device: torch.device,
    *,
    split: bool = True,
) -> LayerKernel:
    """The device's own kernel, or another that was asked for.

    The environment variable ``SVSK_KERNEL`` decides: ``fused`` is base and sidecar in one,
    ``split`` the base through vLLM's own 4-bit kernel and the sidecar after it, ``portable``
    PyTorch's float32 product with int8 levels, ``reference`` the dequantised weight. ``auto``, the
    default, is the first of fused, split and portable that can run; portable only on a CPU, in
    float32 or for a table, because elsewhere it would cost more than an error does.

    ``SVSK_ACTIVATIONS`` or, where it is not set, ``additional_config["svsk"]["activations"]`` of
    vLLM's config, and then the checkpoint's own, says in what the base is multiplied: ``exact``,
    the default, or ``int8``, which the fused kernel of CPUs alone can do. What the checkpoint says
    is a recommendation: where it cannot be followed, products are exact, and a line says so.

    With vLLM's ``VLLM_BATCH_INVARIANT`` a row's result has the same bits whatever rows are beside
    it, which the fused kernels alone can do.

    Args:
        prefix: the layer's name, for errors.
        spec: the layer as this process holds it.
        full_shape: N and K of the layer over all tensor-parallel ranks.
        device: where the layer runs.
        split: whether vLLM's own kernel may run the base: not that of an expert, whose parameters
            are one of a stack.

    Raises:
        SvskFormatError: no kernel takes the layer, or not the one asked for, or the variable has
            another value; or vLLM is to be batch invariant, and the layer cannot be.
    """
    name = os.environ.get(_VARIABLE, "auto")
    if name not in _NAMES:
        raise SvskFormatError(
            f"{_VARIABLE}={name}: no such kernel, expected one of {', '.join(_NAMES)}."
        )
    activations, asked = _activations()
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        # The system permits AMX to a process that asks, as oneDNN does for a dense model. Attention
        # of vLLM does not, and without a product of oneDNN before it the process ended with an
        # illegal instruction.
        torch.cpu._init_amx()
    if name == "split" and not split:
        raise SvskFormatError(
            f"{prefix}: {_VARIABLE}=split, which does not run experts. Unset it, or set it to"
            " portable."
        )
    if _invariant():
        spec = replace(spec, batch_invariant=True)
        _require_invariant(name, prefix, spec, device)
    kernel = _choose(name, prefix, spec, full_shape, device, activations, split=split)
    # Tables are always exact.
    if activations == "int8" and not (spec.is_table or isinstance(kernel, CpuKernel)):
        kind = type(kernel).__name__
        if asked:
            raise SvskFormatError(
                f"{prefix}: activations int8, which the kernel for CPUs alone takes, but the layer"
                f" runs on {kind}. Leave {_ACTIVATIONS} and additional_config's"
                f" {_SECTION}.activations out."
            )
        _tell_exact(kind)
    _tell_compiler(kernel)
    return kernel


def _activations() -> tuple[Literal["exact", "int8"], bool]:
    """What is said of activations, and whether the user said it: else it is the checkpoint."""
    where, value = _ACTIVATIONS, os.environ.get(_ACTIVATIONS)
    if value is None:
        config = get_current_vllm_config().additional_config
        section = config.get(_SECTION, {}) if isinstance(config, dict) else {}
        if not isinstance(section, dict) or not set(section) <= {"activations"}:
            raise SvskFormatError(
                f"additional_config: {_SECTION}: {section!r} holds something else than activations,"
                ' the one thing that can be said there. Write {"svsk": {"activations": "int8"}}.'
            )
        where, value = f"additional_config: {_SECTION}.activations", section.get("activations")
    if value is None:
        stored = getattr(get_current_vllm_config().quant_config, "checkpoint", None)
        return getattr(stored, "activations", "exact"), False
    if value == "exact":
        return "exact", True
    if value != "int8":
        raise SvskFormatError(f"{where}={value}: expected exact or int8.")
    return "int8", True


def _choose(
    name: str,
    prefix: str,
    spec: LayerSpec,
    full_shape: tuple[int, int],
    device: torch.device,
    activations: Literal["exact", "int8"],
    *,
    split: bool,
) -> LayerKernel:
    if name == "reference":
        _note(spec.n, spec.k, "the dequantised weight")
        return ReferenceKernel(spec)
    obstacles: list[str] = []
    if name in ("auto", "fused"):
        obstacle = _fused_obstacle(spec, device)
        if not obstacle:
            if device.type != "cpu":
                _note(spec.n, spec.k, "the Triton kernel")
                return _of_gpu(spec)(spec, device)
            kernel = CpuKernel(spec, activations)
            _note(spec.n, spec.k, f"the CPU kernel ({kernel.label})")
            return kernel
        if name == "fused":
            raise SvskFormatError(
                f"{prefix}: {_VARIABLE}=fused, but {obstacle}. Unset it, or set it to portable."
            )
        obstacles.append(obstacle)
    if name != "portable" and split:
        try:
            kernel_of_vllm = SplitKernel(prefix, spec, full_shape, device)
        except NoBaseKernelError as error:
            dear = device.type != "cpu" and spec.dtype != torch.float32
            if name == "split" or (dear and not spec.is_table):
                raise
            obstacles.append(error.reason)
        else:
            base = type(kernel_of_vllm.base).__name__
            _note(spec.n, spec.k, f"{base} and a sidecar apart", *obstacles)
            return kernel_of_vllm
    _note(
        spec.n,
        spec.k,
        "float32 products with int8 levels",
        *obstacles,
        *_slow_dtype(spec.dtype, device),
    )
    return PortableKernel(spec)


def _invariant() -> bool:
    """Whether vLLM is to give a row the same bits whatever rows are beside it."""
    return bool(getattr(envs, _INVARIANT, False))


def _of_gpu(spec: LayerSpec) -> type[Int8Kernel] | type[TritonKernel]:
    return Int8Kernel if spec.codebook == "int8" else TritonKernel


def _fused_obstacle(spec: LayerSpec, device: torch.device) -> str | None:
    """Why the device's own kernel does not take a layer; None when it does."""
    if device.type == "cpu":
        return CpuKernel.obstacle(spec)
    return _of_gpu(spec).obstacle(spec, device)


def _require_invariant(name: str, prefix: str, spec: LayerSpec, device: torch.device) -> None:
    """Raise SvskFormatError where a row's bits would depend on the rows beside it."""
    if spec.lookup and spec.plan is not None:
        raise SvskFormatError(
            f"{prefix}: {_INVARIANT}=1, but rows of this table have a sidecar, and the product that"
            f" looks it up depends on the number of rows. Unset {_INVARIANT}, or quantise with"
            " --head int8."
        )
    if name not in ("auto", "fused"):
        raise SvskFormatError(
            f"{prefix}: {_INVARIANT}=1, which the fused kernels alone can do, but {_VARIABLE}="
            f"{name}. Unset one of the two."
        )
    obstacle = _fused_obstacle(spec, device)
    if obstacle:
        raise SvskFormatError(
            f"{prefix}: {_INVARIANT}=1, which the fused kernels alone can do, but {obstacle}. Unset"
            f" {_INVARIANT}, or serve the dense model."
        )


def _tell_compiler(kernel: LayerKernel) -> None:
    """Make the kernel part of what vLLM keys its compiled graphs by.

    They call its op with its own tensors.
    """
    extra = get_current_vllm_config().additional_config
    if isinstance(extra, dict):
        extra[_KEY] = sorted({*extra.get(_KEY, ()), *_kernel_names(kernel)})
        mode = "batch invariant" if _invariant() else ""
        extra[_VERSION_KEY] = " ".join(filter(None, (__version__, simulated_features(), mode)))


def _kernel_names(kernel: LayerKernel) -> list[str]:
    """Names of the kernel's class, with the instructions it runs on, and of vLLM's kernel in it."""
    if isinstance(kernel, CpuKernel):
        return [f"CpuKernel {kernel.label}"]
    base = getattr(kernel, "base", None)
    return [type(part).__name__ for part in (kernel, base) if part is not None]


def _note(n: int, k: int, kernel: str, *obstacles: str) -> None:
    """Log what layers of a shape run on.

    Once, and once for all shapes where it is not what one would want.
    """
    if not obstacles:
        _tell(n, k, kernel)
    elif kernel not in _warned:
        _warned.add(kernel)
        reasons = " ".join(f"{text.rstrip('.')}." for text in obstacles)
        _logger.warning(
            "SVSK layers run on %s, which is slower: %s %s chooses another.",
            kernel,
            reasons,
            _VARIABLE,
        )


@lru_cache(maxsize=16)
def _tell_exact(kernel: str) -> None:
    _logger.warning(
        "The checkpoint recommends activations of 8 bits, which the kernel for CPUs alone takes: %s"
        " multiplies them as they are.",
        kernel,
    )


@lru_cache(maxsize=1024)
def _tell(n: int, k: int, kernel: str) -> None:
    _logger.info("SVSK layers of %d x %d run on %s", n, k, kernel)


def _slow_dtype(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Advice for a model that is served in a dtype in which the processor does not multiply."""
    slow = device.type == "cpu" and dtype != torch.float32 and not has_bf16_products()
    return ["Serve with --dtype float32: this processor multiplies in no other"] if slow else []
