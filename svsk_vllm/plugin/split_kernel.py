# SPDX-License-Identifier: Apache-2.0
"""Layers through vLLM's own kernel for 4-bit weights and ``svsk::sidecar``.

On every device, exact, not the fastest.

vLLM's kernels know evenly spaced levels only. A quad8 level c is (16 high + low) / 8 with two
ordinary codes, so such a layer is multiplied as one of twice the inputs: weights [high | low],
activations [x | x / 16], all scales doubled. In bfloat16 that is exact; in float16, x / 16 rounds
only where it is subnormal, to 2**-25, and counts a sixteenth.
"""

import dataclasses
import inspect
from functools import lru_cache
from typing import Any

import torch
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from svsk_kernels.cpu.processor import has_avx512, product_dtype, simulated_features
from svsk_kernels.errors import one_line
from svsk_kernels.group_scales import pop_scales
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters
from svsk_kernels.sidecar_op import prepare_sidecar
from svsk_vllm.format import SvskFormatError, code_values, pack_codes, unpack_codes

__all__ = ["NoBaseKernelError", "SplitKernel", "split_codes"]

_TRIAL_BOUND = 0.1
"""Relative error of a product that is right. With AMX vLLM rounds activations to 8 bits."""


class NoBaseKernelError(SvskFormatError):
    """No kernel of vLLM runs the base of a layer.

    ``reason`` says why, without the layer's name and the remedy.
    """

    def __init__(self, prefix: str, reason: str, remedy: str) -> None:
        super().__init__(f"{prefix}: {reason}. {remedy}")
        self.reason = reason


class SplitKernel:
    """Base and sidecar apart; a :class:`svsk_kernels.LayerKernel`.

    Args:
        prefix: the layer's name, for errors.
        spec: the layer as this process holds it.
        full_shape: N and K of the layer over all tensor-parallel ranks.
        device: where the layer runs.

    Raises:
        NoBaseKernelError: no kernel of vLLM takes the base, or on a CPU the one that does cannot
            run.
    """

    def __init__(
        self, prefix: str, spec: LayerSpec, full_shape: tuple[int, int], device: torch.device
    ) -> None:
        if spec.codebook == "int8" or spec.lookup:
            what = "an embedding table" if spec.lookup else "8-bit codes"
            raise NoBaseKernelError(
                prefix,
                f"vLLM's 4-bit kernels do not take {what}",
                "Unset SVSK_KERNEL, or set it to portable.",
            )
        self.prefix, self.spec = prefix, spec
        self.plan = spec.plan.encode() if spec.plan else []
        self.factors = product_dtype(spec.dtype, device)
        self.base = _vllm_kernel(prefix, spec, full_shape, device)

    def prepare(self, layer: Any) -> None:
        """Replace the parameters by those of vLLM's kernel and of ``svsk::sidecar``."""
        scale = pop_scales(layer)
        if self.spec.codebook == "quad8":
            self._split_base(layer, scale)
        elif self.spec.row_scaled:
            _set_base(layer, layer.weight_packed.data, scale)
        self.base.process_weights_after_loading(layer)
        if self.spec.plan:
            loaded = (layer.sidecar_u.data, layer.sidecar_v.data, layer.sidecar_gain.data)
            names = ("sidecar_u", "sidecar_v", "sidecar_gain")
            replace_parameters(
                layer, dict(zip(names, prepare_sidecar(*loaded, self.factors), strict=True))
            )

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W_hat^T + bias``: [M, N] from [M, K], both of the layer's dtype."""
        doubled = torch.cat((x, x / 16), dim=1) if self.spec.codebook == "quad8" else x
        # Some kernels want the bias themselves.
        y: torch.Tensor = self.base.apply_weights(layer, doubled, bias)
        if self.plan:
            y = y + torch.ops.svsk.sidecar(
                x, layer.sidecar_u, layer.sidecar_v, layer.sidecar_gain, self.plan
            )
        return y

    def _split_base(self, layer: Any, scale: torch.Tensor) -> None:
        """Parameters of a layer of evenly spaced levels and twice the inputs."""
        codes = split_codes(unpack_codes(layer.weight_packed.data, self.spec.k))
        scale = scale * 2
        if not torch.isfinite(scale).all():
            raise SvskFormatError(
                f"{self.prefix}.weight_scale: twice the largest scale is not finite in"
                f" {self.spec.dtype}. Serve the model with --dtype bfloat16."
            )
        _set_base(layer, pack_codes(torch.cat(codes, dim=1)), torch.cat((scale, scale), dim=1))


def split_codes(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low with ``16 high + low = 8 c(q)`` for the codebook quad8, both in [-8, 7].

    Args:
        codes: int8, any shape.

    Returns:
        Two int8 tensors of the same shape.
    """
    eighths = (code_values(codes, "quad8") * 8).to(torch.int16)
    high = torch.div(eighths + 8, 16, rounding_mode="floor")
    return high.to(torch.int8), (eighths - 16 * high).to(torch.int8)


def _set_base(layer: Any, packed: torch.Tensor, scale: torch.Tensor) -> None:
    """Register a base as vLLM's kernels look for it, in the checkpoint's layout."""
    layout: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "weight_loader": _never_loaded}
    layer.weight_packed = PackedvLLMParameter(data=packed, packed_dim=1, packed_factor=8, **layout)
    layer.weight_scale = GroupQuantScaleParameter(data=scale, **layout)


def _never_loaded(*_: Any) -> None:
    raise AssertionError("a prepared parameter is not loaded into")


def _vllm_kernel(
    prefix: str, spec: LayerSpec, full_shape: tuple[int, int], device: torch.device
) -> Any:
    """vLLM's mixed-precision kernel for the base; vLLM's shapes are [in, out]."""
    times = 2 if spec.codebook == "quad8" else 1
    full, part = (full_shape[1] * times, full_shape[0]), (spec.k * times, spec.n)
    config = _config(full, part, spec.dtype, spec.group_size)
    try:
        kernel = choose_mp_linear_kernel(config)
    except ValueError as error:
        raise NoBaseKernelError(
            prefix,
            f"no 4-bit kernel of vLLM takes {spec.n} x {spec.k} weights per rank"
            f" ({one_line(error)})",
            "Change tensor_parallel_size, or put the module on the ignore list when quantising.",
        ) from error
    if device.type == "cpu" and (obstacle := _cpu_obstacle(kernel, config)):
        raise NoBaseKernelError(
            prefix,
            f"vLLM's {kernel.__name__} cannot run: {obstacle}",
            "Unset SVSK_KERNEL, or set it to portable.",
        )
    return _instance(kernel, config)


def _config(
    full: tuple[int, int], part: tuple[int, int], dtype: torch.dtype, group_size: int
) -> MPLinearLayerConfig:
    """What vLLM's kernels are asked about; shapes [in, out] of all ranks and of this one."""
    values: dict[str, Any] = {
        "full_weight_shape": full,
        "partition_weight_shape": part,
        "weight_type": scalar_types.uint4b8,
        "act_type": dtype,
        "group_size": group_size,
        "zero_points": False,
        "has_g_idx": False,  # gone since vLLM 0.29
    }
    names = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
    return MPLinearLayerConfig(**{key: value for key, value in values.items() if key in names})


def _instance(kernel: type, config: MPLinearLayerConfig) -> Any:
    names = {
        "w_q_param_name": "weight_packed",
        "w_s_param_name": "weight_scale",
        "w_zp_param_name": "weight_zero_point",
        "w_gidx_param_name": "weight_g_idx",
    }
    accepted = inspect.signature(kernel).parameters
    return kernel(config, **{key: value for key, value in names.items() if key in accepted})


def _cpu_obstacle(kernel: type, config: MPLinearLayerConfig) -> str | None:
    """Why a kernel that says it takes a layer cannot run on this processor; None when it can.

    vLLM compiles some of its operators for some processors and dtypes only, and asks for them at
    the first product.
    """
    if simulated_features() == "avx2":
        return "the processor has no AVX-512"
    # The system permits AMX to a process that asks for it; vLLM's kernel does not ask, and the
    # process would end.
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        return "the system does not permit AMX"
    return _failed_trial(kernel, config.act_type, config.group_size)


@lru_cache(maxsize=64)
def _failed_trial(kernel: type, dtype: torch.dtype, group_size: int) -> str | None:
    """What is wrong with one product of a small layer; None if nothing is."""
    n, k = 64, 4 * group_size
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator, device="cpu")
    scale = torch.full((n, k // group_size), 2.0**-6, dtype=dtype, device="cpu")
    x = torch.randn(3, k, generator=generator, dtype=torch.float32, device="cpu")
    layer: Any = torch.nn.Module()
    layer.bias = None
    _set_base(layer, pack_codes(codes), scale)
    lacking = "" if has_avx512() else "the processor has no AVX-512: "
    try:
        base = _instance(kernel, _config((k, n), (k, n), dtype, group_size))
        base.process_weights_after_loading(layer)
        y = base.apply_weights(layer, x.to(dtype), None).float()
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        return f"{lacking}{one_line(error)}"
    expected = x @ (codes.float() * 2.0**-6).T
    off = float((y - expected).norm() / expected.norm())
    return None if off < _TRIAL_BOUND else f"{lacking}a product in {dtype} is off by {off:.0%}"
