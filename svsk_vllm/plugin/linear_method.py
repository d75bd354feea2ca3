# SPDX-License-Identifier: Apache-2.0
"""Serving a quantised linear.

What vLLM asks of a linear method. A kernel of the device does the arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from svsk_kernels.group_scales import expand_scales
from svsk_kernels.layer_kernel import LayerSpec
from svsk_vllm.format import ConfigGroup, LinearSpec, SvskFormatError
from svsk_vllm.format.group_scales import ONE_LEVEL
from svsk_vllm.format.suffixes import (
    SIDECAR_GAIN,
    SUFFIXES,
    WEIGHT_PACKED,
    WEIGHT_ROW_SCALE,
    WEIGHT_SCALE,
)
from svsk_vllm.plugin.kernel_choice import choose_kernel
from svsk_vllm.plugin.shard_probe import ShardId, probe_columns, probe_rows
from svsk_vllm.plugin.sidecar_layout import SidecarLayout, build_layout
from svsk_vllm.plugin.sidecar_loader import (
    SIDECAR_DTYPES,
    Arrived,
    StoredBase,
    base_loader,
    clear_padding,
    tile_loader,
)
from svsk_vllm.plugin.stored_names import other_size

__all__ = ["PARAMETERS", "Origin", "SvskLinearMethod", "check_finite", "fused_sizes"]

PARAMETERS = frozenset(SUFFIXES)
"""Names of the parameters that the method registers."""


@dataclass(frozen=True)
class Origin:
    """Where the parts of a layer come from.

    Attributes:
        names: the parts' names in the checkpoint.
        stored: what is stored of them, None where that is not known before loading.
        row_order: for the number of rows of an unfused layer, the stored row of each row that the
            model's loader hands on, None where the order is kept.
        known_order: False where the model's loader moves rows in an order that is not known, for
            bases alone.
        counted: whether the parameters have to be loaded at all: not where vLLM makes weights up.
    """

    names: tuple[str, ...]
    stored: tuple[LinearSpec, ...] | None = None
    row_order: Callable[[int], torch.Tensor | None] = lambda _: None
    known_order: bool = True
    counted: bool = True


@register_weight_loader_v2_supported_method
class SvskLinearMethod(LinearMethodBase):
    """Linear method of one layer.

    Args:
        prefix: the layer's name in the vLLM model.
        parts: names of the checkpoint's linears fused into it, in order.
        schemes: their schemes.
        origin: where they come from; without it they have vLLM's names.

    Raises:
        SvskFormatError: the parts' bases differ.
    """

    lookup = False  # whether rows are looked up as well

    def __init__(
        self,
        prefix: str,
        parts: Sequence[str],
        schemes: Sequence[ConfigGroup],
        origin: Origin | None = None,
    ) -> None:
        self.prefix, self.parts, self.schemes = prefix, list(parts), list(schemes)
        self.origin = origin or Origin(tuple(parts))
        self.weights = schemes[0].weights
        self.row_scaled = self.weights.scale_bits != ONE_LEVEL
        if any(scheme.weights != self.weights for scheme in schemes):
            raise SvskFormatError(
                f"{prefix}: vLLM fuses {', '.join(parts)}, whose group sizes, codebooks or"
                " scale_bits differ. Quantise them with the same ones; ranks and tiles may differ."
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
            SvskFormatError: the shard's columns do not fit the groups, or no kernel takes the
                layer.
        """
        loader = extra["weight_loader"]
        n, k, group = sum(output_partition_sizes), input_size_per_partition, self.weights.group_size
        if k % group:
            smaller = next((size for size in (32, 16) if size < group and not k % size), None)
            hint = f", or quantise with --group-size {smaller}" if smaller else ""
            raise SvskFormatError(
                f"{self.prefix}: each rank gets {k} of {input_size} input features, not a multiple"
                f" of the group size {group}. Lower tensor_parallel_size{hint}."
            )
        self.input_size, self.output_size = input_size, output_size
        self.params_dtype = params_dtype
        self._check_sizes(layer, input_size, output_size)
        shards = self._shard_ids(layer)
        order = self.origin.row_order(output_size)
        self.arrived = Arrived(dict(zip(shards, self.origin.names, strict=True)), self.schemes)
        self._register_base(layer, n, k, partial(self._base_loader, loader, order))
        self.layout = build_layout(
            self.prefix,
            list(zip(shards, self.schemes, strict=True)),
            lambda shard: _stored_rows(self._rows(layer, loader, n, shard), order),
            lambda shard: self._columns(layer, loader, k, shard),
            input_size,
            n,
        )
        if self.layout:
            self._register_sidecar(layer, self.layout)
        plan = self.layout.plan if self.layout else None
        bits: Literal[4, 8] = (
            4 if all(s.sidecar.num_bits == 4 for s in self.schemes if s.sidecar.rank) else 8
        )
        spec = LayerSpec(
            n,
            k,
            group,
            self.weights.joined_codebook,
            params_dtype,
            plan,
            bits,
            self.row_scaled,
            self.lookup,
        )
        device = layer.weight_packed.device
        self.kernel = choose_kernel(self.prefix, spec, (output_size, input_size), device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn the loaded parameters into those of the kernel.

        Raises:
            SvskFormatError: something was not loaded, or scales or gains are not finite.
        """
        if self.origin.counted:
            self.arrived.check(self.prefix)
        self._join(layer)
        if self.origin.counted:
            check_finite(self.prefix, layer)
        if self.layout:
            clear_padding(layer.sidecar_v.data, self.layout.plan)
        self.kernel.prepare(layer)

    def _join(self, layer: Any) -> None:
        """Make of what was loaded what kernels know, where these are not the same."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W_hat^T + bias``.

        Args:
            layer: the layer.
            x: [..., K]; another dtype than the layer's is cast to it and the result cast back.
            bias: [N] or None.

        Returns:
            [..., N] of the dtype of ``x``.
        """
        if x.dim() == 2 and x.dtype == self.params_dtype:
            return self.kernel(layer, x, bias)
        y = self.kernel(layer, x.reshape(-1, x.shape[-1]).to(self.params_dtype), bias)
        return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def _rows(self, layer: Any, loader: Any, n: int, shard: ShardId) -> torch.Tensor:
        """Checkpoint row of each of the layer's ``n`` rows, int64 [n], -1 for another part's."""
        tp = (layer.tp_rank, layer.tp_size)
        return probe_rows(loader, self.output_size, n, tp, shard)

    def _columns(self, layer: Any, loader: Any, k: int, shard: ShardId) -> torch.Tensor:
        """Checkpoint column of each of the layer's ``k`` columns, int64 [k]."""
        tp = (layer.tp_rank, layer.tp_size)
        return probe_columns(loader, self.input_size, k, tp, shard)

    def _shard_ids(self, layer: Any) -> list[ShardId]:
        """vLLM's name of each part, as its loaders are called with it."""
        if len(self.parts) == 1:
            return [None]
        if isinstance(layer, QKVParallelLinear) and len(self.parts) == 3:
            return ["q", "k", "v"]
        if isinstance(layer, MergedColumnParallelLinear):
            sizes = layer.output_sizes
            if len(self.parts) == len(sizes):
                return list(range(len(self.parts)))
            rows = [spec.n for spec in self.origin.stored or ()]
            if shards := _joined_shards(sizes, rows):
                return shards
        raise SvskFormatError(
            f"{self.prefix}: vLLM fuses {', '.join(self.parts)} into a {type(layer).__name__},"
            " which the plugin does not know. Put these modules on the ignore list when"
            " quantising."
        )

    def _check_sizes(self, layer: Any, input_size: int, output_size: int) -> None:
        """Refuse tensors of other sizes than the layer's.

        vLLM's loaders take the first rows of a larger one.
        """
        if self.origin.stored is None:
            return
        sizes = fused_sizes(layer) or [output_size]
        rows = [sum(sizes)] if len(self.parts) == 1 else sizes
        if len(rows) != len(self.parts):
            return  # some hold several of vLLM's parts; found by their sizes
        for spec, want in zip(self.origin.stored, rows, strict=False):
            # Layers of merged columns may repeat groups of rows on each rank, and then have more
            # than are stored.
            repeats = isinstance(layer, MergedColumnParallelLinear) and spec.n < want
            if spec.k == input_size and spec.n < want and not repeats and layer.tp_size > 1:
                raise SvskFormatError(
                    f"{spec.name}: with tensor_parallel_size {layer.tp_size} vLLM gives every rank"
                    f" a copy of some of its rows ({want} of {spec.n}; the groups of a Mamba"
                    " mixer), and takes a quantised weight apart wrong. Choose a"
                    " tensor_parallel_size that divides the number of groups, or quantise with"
                    f" --ignore {spec.name}."
                )
            if spec.k != input_size or (spec.n != want and not repeats):
                raise other_size(spec, want, input_size)

    def _register_base(
        self, layer: Any, n: int, k: int, loader_of: Callable[[str], Callable[..., None]]
    ) -> None:
        """Register codes and scales of ``n`` rows and ``k`` columns."""
        groups = k // self.weights.group_size
        dtype = torch.int8 if self.row_scaled else self.params_dtype
        packed = PackedvLLMParameter(
            data=torch.empty(n, k // self.weights.codes_per_word, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=self.weights.codes_per_word,
            weight_loader=loader_of(WEIGHT_PACKED),
        )
        layer.register_parameter(WEIGHT_PACKED, packed)
        scale = GroupQuantScaleParameter(
            data=torch.empty(n, groups, dtype=dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=loader_of(WEIGHT_SCALE),
        )
        layer.register_parameter(WEIGHT_SCALE, scale)
        if self.row_scaled:
            row_scale = ChannelQuantScaleParameter(
                data=torch.empty(n, 1, dtype=self.params_dtype),
                output_dim=0,
                weight_loader=loader_of(WEIGHT_ROW_SCALE),
            )
            layer.register_parameter(WEIGHT_ROW_SCALE, row_scale)

    def _base_loader(self, loader: Any, order: torch.Tensor | None, name: str) -> Any:
        return base_loader(
            self.prefix,
            name,
            loader,
            self.arrived,
            order,
            StoredBase(self.weights, self.input_size // self.weights.group_size),
            keep=self.origin.known_order,
            whole=any(scheme.sidecar.rank for scheme in self.schemes),
        )

    def _register_sidecar(self, layer: Any, layout: SidecarLayout) -> None:
        for name, data in zip(SIDECAR_DTYPES, layout.plan.zeros(), strict=True):
            loader = tile_loader(self.prefix, name, layout, self.input_size, self.arrived)
            layer.register_parameter(name, BasevLLMParameter(data=data, weight_loader=loader))


def fused_sizes(layer: Any) -> list[int] | None:
    """Outputs of each part of a fused layer over all tensor-parallel ranks; None for another layer.

    vLLM's own ``output_sizes`` count key/value heads once for each rank that holds a copy.
    """
    if isinstance(layer, QKVParallelLinear):
        value_size = getattr(layer, "v_head_size", layer.head_size)
        kv_heads = layer.total_num_kv_heads
        return [
            layer.total_num_heads * layer.head_size,
            kv_heads * layer.head_size,
            kv_heads * value_size,
        ]
    return list(layer.output_sizes) if isinstance(layer, MergedColumnParallelLinear) else None


def _joined_shards(sizes: Sequence[int], rows: Sequence[int]) -> list[ShardId] | None:
    """vLLM's parts that each stored tensor fills, in their order; None where sizes do not add up.

    Args:
        sizes: of vLLM's parts.
        rows: of the stored tensors, which are fewer.
    """
    shards: list[ShardId] = []
    place = 0
    for count in rows:
        members: list[int] = []
        while place < len(sizes) and sum(sizes[one] for one in members) < count:
            members.append(place)
            place += 1
        if sum(sizes[one] for one in members) != count:
            return None
        shards.append(members[0] if len(members) == 1 else tuple(members))
    return shards if rows and place == len(sizes) else None


def _stored_rows(probed: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Stored rows of a layer's rows, from those of what its loader is given; -1 stays."""
    return probed if order is None else torch.where(probed >= 0, order[probed.clamp(min=0)], -1)


def check_finite(prefix: str, layer: Any) -> None:
    """Refuse a loaded layer with scales or gains that are not finite.

    Raises:
        SvskFormatError: it has some.
    """
    scale, row_scale = layer.weight_scale.data, getattr(layer, WEIGHT_ROW_SCALE, None)
    values = {WEIGHT_SCALE: scale if row_scale is None else expand_scales(scale, row_scale.data)}
    if hasattr(layer, SIDECAR_GAIN):
        values[SIDECAR_GAIN] = layer.sidecar_gain.data
    for name, tensor in values.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise SvskFormatError(
                f"{prefix}.{name}: {bad} of {tensor.numel()} values are not finite in"
                f" {tensor.dtype}. `svsk validate` tells whether the checkpoint is damaged; if not,"
                " serve it in its own dtype."
            )
