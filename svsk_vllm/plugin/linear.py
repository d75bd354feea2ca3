# SPDX-License-Identifier: Apache-2.0
"""Serving a quantised linear: what vLLM asks of a linear method. A kernel of the device does the arithmetic."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter, GroupQuantScaleParameter, PackedvLLMParameter

from svsk_kernels import LayerSpec
from svsk_vllm.format import ConfigGroup, SvskFormatError
from svsk_vllm.plugin.choice import choose_kernel
from svsk_vllm.plugin.loading import SIDECAR_DTYPES, clear_padding, tile_loader
from svsk_vllm.plugin.sharding import ShardId, SidecarLayout, build_layout, probe_columns, probe_rows

__all__ = ["SvskLinearMethod"]

_CODES_PER_WORD = 8


@register_weight_loader_v2_supported_method
class SvskLinearMethod(LinearMethodBase):
    """Linear method of one layer.

    Args:
        prefix: the layer's name in the vLLM model.
        parts: names of the checkpoint's linears fused into it, in order.
        schemes: their schemes.

    Raises:
        SvskFormatError: the parts' bases differ.
    """

    def __init__(self, prefix: str, parts: Sequence[str], schemes: Sequence[ConfigGroup]) -> None:
        self.prefix, self.parts, self.schemes = prefix, list(parts), list(schemes)
        self.weights = schemes[0].weights
        if any(scheme.weights != self.weights for scheme in schemes):
            raise SvskFormatError(
                f"{prefix}: vLLM fuses {', '.join(parts)}, whose group sizes or codebooks differ. Quantise them with "
                "the same ones; ranks and tiles may differ."
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
        """Register the layer's parameters and choose its kernel.

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
        tp = (layer.tp_rank, layer.tp_size)
        self.layout = build_layout(
            self.prefix,
            list(zip(self._shard_ids(layer), self.schemes, strict=True)),
            lambda shard: probe_rows(loader, output_size, n, tp, shard),
            lambda shard: probe_columns(loader, input_size, k, tp, shard),
            input_size,
            n,
        )
        if self.layout:
            self._register_sidecar(layer, self.layout)
        plan = self.layout.plan if self.layout else None
        bits: Literal[4, 8] = 4 if all(s.sidecar.num_bits == 4 for s in self.schemes if s.sidecar.rank) else 8
        spec = LayerSpec(n, k, group, self.weights.codebook, params_dtype, plan, bits)
        self.kernel = choose_kernel(self.prefix, spec, (output_size, input_size), packed.device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn the loaded parameters into those of the kernel."""
        if self.layout:
            clear_padding(layer.sidecar_v.data, self.layout)
        self.kernel.prepare(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W_hat^T + bias``.

        Args:
            layer: the layer.
            x: [..., K]; another dtype than the layer's is cast to it and the result cast back.
            bias: [N] or None.

        Returns:
            [..., N] of the dtype of ``x``.
        """
        y = self.kernel(layer, x.reshape(-1, x.shape[-1]).to(self.params_dtype), bias)
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

    def _register_sidecar(self, layer: Any, layout: SidecarLayout) -> None:
        plan = layout.plan
        sizes = {"sidecar_u": plan.u_numel, "sidecar_v": plan.v_numel, "sidecar_gain": plan.gain_numel}
        for name, dtype in SIDECAR_DTYPES.items():
            loader = tile_loader(self.prefix, name, layout, self.input_size)
            data = torch.zeros(sizes[name], dtype=dtype)
            layer.register_parameter(name, BasevLLMParameter(data=data, weight_loader=loader))
