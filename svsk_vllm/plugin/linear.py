# SPDX-License-Identifier: Apache-2.0
"""Serving a quantised linear: the base through vLLM's own 4-bit kernel, the sidecar through ``svsk::sidecar``."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter, GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from svsk_kernels import FACTOR_STEP, factor_dtype
from svsk_vllm.format import ConfigGroup, SvskFormatError, unpack_factors
from svsk_vllm.plugin.sharding import PartLayout, ShardId, SidecarLayout, build_layout, probe_columns, probe_rows

__all__ = ["SvskLinearMethod", "tile_loader"]

_CODES_PER_WORD = 8
_SIDECAR = ("sidecar_u", "sidecar_v", "sidecar_gain")


@register_weight_loader_v2_supported_method
class SvskLinearMethod(LinearMethodBase):
    """Linear method of one layer.

    Args:
        prefix: the layer's name in the vLLM model.
        parts: names of the checkpoint's linears fused into it, in order.
        schemes: their schemes.

    Raises:
        SvskFormatError: the parts' bases differ, or the codebook is not served.
    """

    def __init__(self, prefix: str, parts: Sequence[str], schemes: Sequence[ConfigGroup]) -> None:
        self.prefix, self.parts, self.schemes = prefix, list(parts), list(schemes)
        self.weights = schemes[0].weights
        if any(scheme.weights != self.weights for scheme in schemes):
            raise SvskFormatError(
                f"{prefix}: vLLM fuses {', '.join(parts)}, whose group sizes or codebooks differ. Quantise them with "
                "the same ones; ranks and tiles may differ."
            )
        if self.weights.codebook != "int4":
            raise SvskFormatError(
                f"{prefix}: codebook {self.weights.codebook!r} has no kernel in this version. Quantise with "
                "--codebook int4 to serve the model, or load it with transformers (import svsk_vllm.hf)."
            )

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the layer's parameters and choose the kernel of the base.

        Raises:
            SvskFormatError: the shard's columns do not fit the groups, or no kernel takes the layer.
        """
        loader = extra["weight_loader"]
        n, k, group = sum(output_partition_sizes), input_size_per_partition, self.weights.group_size
        if k % group:
            raise SvskFormatError(
                f"{self.prefix}: each rank gets {k} of {input_size} input features, not a multiple of the group size "
                f"{group}. Lower tensor_parallel_size, or quantise with --group-size 32 if {k} is a multiple of 32."
            )
        self.input_size, self.params_dtype = input_size, params_dtype
        packed = torch.empty(n, k // _CODES_PER_WORD, dtype=torch.int32)
        scale = torch.empty(n, k // group, dtype=params_dtype)
        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(
                data=packed,
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=_CODES_PER_WORD,
                weight_loader=loader,
            ),
        )
        layer.register_parameter(
            "weight_scale", GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=loader)
        )
        self.kernel = self._base_kernel((input_size, output_size), (k, n))
        tp = (layer.tp_rank, layer.tp_size)
        self.layout = build_layout(
            self.prefix,
            list(zip(self._shard_ids(layer), self.schemes, strict=True)),
            lambda shard: probe_rows(loader, output_size, n, tp, shard),
            lambda shard: probe_columns(loader, input_size, k, tp, shard),
            input_size,
            n,
        )
        self.plan = self.layout.plan.encode() if self.layout else []
        if self.layout:
            self._register_sidecar(layer, self.layout, factor_dtype(params_dtype, packed.device))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the base for its kernel; make the sidecar's parameters plain tensors."""
        self.kernel.process_weights_after_loading(layer)
        if self.layout:
            _clear_padding(layer.sidecar_v.data, self.layout)
            for name in _SIDECAR:
                setattr(layer, name, Parameter(getattr(layer, name).data, requires_grad=False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W_hat^T + bias``.

        Args:
            layer: the layer.
            x: [..., K]; another dtype than the layer's is cast to it and the result cast back.
            bias: [N] or None.

        Returns:
            [..., N] of the dtype of ``x``.
        """
        rows = x.reshape(-1, x.shape[-1]).to(self.params_dtype)
        y: torch.Tensor = self.kernel.apply_weights(layer, rows, bias)
        if self.layout:
            y = y + torch.ops.svsk.sidecar(rows, layer.sidecar_u, layer.sidecar_v, layer.sidecar_gain, self.plan)
        return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def _shard_ids(self, layer: Any) -> list[ShardId]:
        """VLLM's name of each part, as its loaders are called with it."""
        if len(self.parts) == 1:
            return [None]
        if isinstance(layer, QKVParallelLinear) and len(self.parts) == 3:
            return ["q", "k", "v"]
        if isinstance(layer, MergedColumnParallelLinear) and len(self.parts) == len(layer.output_sizes):
            return list(range(len(self.parts)))
        raise SvskFormatError(
            f"{self.prefix}: vLLM fuses {', '.join(self.parts)} into a {type(layer).__name__}, which the plugin does "
            "not know. Put these modules on the ignore list when quantising."
        )

    def _base_kernel(self, full_shape: tuple[int, int], shape: tuple[int, int]) -> Any:
        """VLLM's mixed-precision kernel for the base. Shapes are [in, out]."""
        values: dict[str, Any] = {
            "full_weight_shape": full_shape,
            "partition_weight_shape": shape,
            "weight_type": scalar_types.uint4b8,
            "act_type": self.params_dtype,
            "group_size": self.weights.group_size,
            "zero_points": False,
            "has_g_idx": False,  # gone since vLLM 0.29
        }
        known = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
        config = MPLinearLayerConfig(**{key: value for key, value in values.items() if key in known})
        try:
            kernel = choose_mp_linear_kernel(config)
        except ValueError as error:
            raise SvskFormatError(
                f"{self.prefix}: no 4-bit kernel of vLLM takes {shape[1]} x {shape[0]} weights per rank ({error}). "
                "Change tensor_parallel_size, or put the module on the ignore list when quantising."
            ) from error
        names = {
            "w_q_param_name": "weight_packed",
            "w_s_param_name": "weight_scale",
            "w_zp_param_name": "weight_zero_point",
            "w_gidx_param_name": "weight_g_idx",
        }
        accepted = inspect.signature(kernel).parameters
        return kernel(config, **{key: value for key, value in names.items() if key in accepted})

    def _register_sidecar(self, layer: Any, layout: SidecarLayout, dtype: torch.dtype) -> None:
        plan = layout.plan
        tensors = {
            "sidecar_u": torch.zeros(plan.u_numel, dtype=dtype),
            "sidecar_v": torch.zeros(plan.v_numel, dtype=dtype),
            "sidecar_gain": torch.zeros(plan.gain_numel, dtype=torch.float32),
        }
        for name, data in tensors.items():
            loader = tile_loader(self.prefix, name, layout, self.input_size)
            layer.register_parameter(name, BasevLLMParameter(data=data, weight_loader=loader))


def tile_loader(prefix: str, name: str, layout: SidecarLayout, input_size: int) -> Callable[..., None]:
    """Weight loader of one sidecar tensor: copies this rank's tiles to their place in the flat parameter.

    vLLM's reload counts ``copy_`` calls and looks for an argument called ``param``. The closure must not hold the
    layer, which would keep it alive.
    """
    copy = {"sidecar_u": _copy_u, "sidecar_v": _copy_v, "sidecar_gain": _copy_gain}[name]

    def load(param: torch.Tensor, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None) -> None:
        part = layout.parts.get(loaded_shard_id)
        if part is None:
            raise SvskFormatError(
                f"{prefix}.{name}: loaded for shard {loaded_shard_id!r}, but the layer has sidecars for "
                f"{list(layout.parts)}. The checkpoint does not fit its config.json."
            )
        if name != "sidecar_gain":
            loaded_weight = unpack_factors(loaded_weight, part.sidecar.num_bits)
        copy(param.data, loaded_weight, part, f"{prefix}.{name}", input_size)

    return load


def _copy_u(data: torch.Tensor, source: torch.Tensor, part: PartLayout, name: str, input_size: int) -> None:
    """From int8 [N, B, r]."""
    tiles, rank = part.bundle.num_col_tiles, part.sidecar.rank
    _require(name, source, (source.shape[0], -(-input_size // part.tile_n), rank))
    for slot in part.slots:
        rows = source[slot.source_row : slot.source_row + slot.rows, part.first_tile : part.first_tile + tiles]
        place = data.narrow(0, slot.u_start, slot.rows * tiles * rank).view(slot.rows, tiles, rank)
        place.copy_(rows.to(place.dtype) * FACTOR_STEP)


def _copy_v(data: torch.Tensor, source: torch.Tensor, part: PartLayout, name: str, input_size: int) -> None:
    """From int8 [A, r, K]."""
    bundle, rank = part.bundle, part.sidecar.rank
    _require(name, source, (source.shape[0], rank, input_size))
    tiles = data.narrow(0, part.v_start, bundle.v_numel).view(bundle.v_shape)
    for slot in part.slots:
        for index, (start, stop) in enumerate(pairwise(bundle.bounds)):
            place = tiles[index, slot.rank_start : slot.rank_start + rank, : stop - start]
            columns = source[slot.tile, :, part.col_start + start : part.col_start + stop]
            place.copy_(columns.to(place.dtype) * FACTOR_STEP)


def _copy_gain(data: torch.Tensor, source: torch.Tensor, part: PartLayout, name: str, input_size: int) -> None:
    """From float32 [A, B, r]."""
    shape, rank = part.bundle.gain_shape, part.sidecar.rank
    _require(name, source, (source.shape[0], -(-input_size // part.tile_n), rank))
    gains = data.narrow(0, part.gain_start, part.bundle.gain_numel).view(shape)
    for slot in part.slots:
        place = gains[:, slot.rank_start : slot.rank_start + rank]
        place.copy_(source[slot.tile, part.first_tile : part.first_tile + shape[0]] / FACTOR_STEP**2)


def _require(name: str, source: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(source.shape) != shape:
        raise SvskFormatError(
            f"{name}: the checkpoint holds shape {list(source.shape)}, its config.json asks for {list(shape)} "
            "(4-bit factors unpacked). Run `svsk validate` on the folder."
        )


def _clear_padding(v: torch.Tensor, layout: SidecarLayout) -> None:
    """Zero the columns beyond narrow tiles: a reload starts from uninitialised memory."""
    start = 0
    for bundle in layout.plan.bundles:
        tiles = v.narrow(0, start, bundle.v_numel).view(bundle.v_shape)
        for index, (first, last) in enumerate(pairwise(bundle.bounds)):
            tiles[index, :, last - first :].zero_()
        start += tiles.numel()
