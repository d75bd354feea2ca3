# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer, stacked: what is loaded into a stack, and what a kernel reads of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from svsk_kernels.layer_kernel import LayerKernel, LayerSpec, replace_parameters
from svsk_vllm.format import ConfigGroup, SvskFormatError
from svsk_vllm.format.group_scales import ONE_LEVEL
from svsk_vllm.format.suffixes import WEIGHT_PACKED, WEIGHT_ROW_SCALE, WEIGHT_SCALE
from svsk_vllm.plugin.linear_method import check_finite
from svsk_vllm.plugin.sidecar_layout import SidecarLayout, build_layout
from svsk_vllm.plugin.sidecar_loader import (
    SIDECAR_DTYPES,
    Arrived,
    StoredBase,
    base_loader,
    base_names,
    clear_padding,
    tile_loader,
)

__all__ = ["ExpertsHalf", "Projection"]


@dataclass(frozen=True)
class Projection:
    """One of the matrices that every expert of a layer has.

    Attributes:
        shard: vLLM's name of it.
        names: in the checkpoint, by the expert's number over all ranks.
        scheme: of all experts.
    """

    shard: str
    names: tuple[str, ...]
    scheme: ConfigGroup


class ExpertsHalf:
    """Gate and up, or down, of every expert here: parameters, their loaders, the kernel.

    Args:
        stem: of the parameters' names, ``w13`` or ``w2``.
        prefix: the layer's name.
        parts: the projections that are multiplied as one.
        rows: of each part, here.
        columns: here, and in the checkpoint.
        first: the first row (of ``w13``) or column (of ``w2``) of the checkpoint that is here.
        dtype: of activations.

    Raises:
        SvskFormatError: what is here is no whole number of groups.
    """

    def __init__(
        self,
        stem: Literal["w13", "w2"],
        prefix: str,
        parts: list[Projection],
        rows: int,
        columns: tuple[int, int],
        first: int,
        dtype: torch.dtype,
    ) -> None:
        self.stem, self.prefix, self.parts, self.rows = stem, prefix, parts, rows
        self.k, self.stored_k = columns
        self.by_rows, self.first, self.dtype = stem == "w13", first, dtype
        self.weights = parts[0].scheme.weights
        group = self.weights.group_size
        if self.k % group:
            smaller = next((size for size in (32, 16) if size < group and not self.k % size), None)
            hint = f", or quantise with --group-size {smaller}" if smaller else ""
            raise SvskFormatError(
                f"{prefix}: each rank gets {self.k} of {self.stored_k} features of every expert,"
                f" not a multiple of the group size {group}. Lower tensor_parallel_size, add"
                f" --enable-expert-parallel{hint}."
            )
        self.n = rows * len(parts)
        self.layout = self._layout()
        plan = self.layout.plan if self.layout else None
        sidecars = [part.scheme.sidecar for part in parts if part.scheme.sidecar.rank]
        bits: Literal[4, 8] = 4 if all(side.num_bits == 4 for side in sidecars) else 8
        self.spec = LayerSpec(
            self.n,
            self.k,
            group,
            self.weights.joined_codebook,
            dtype,
            plan,
            bits,
            self.weights.scale_bits != ONE_LEVEL,
        )
        self.names: tuple[str, ...] = ()  # of what the kernel reads, once prepared

    def _layout(self) -> SidecarLayout | None:
        numbers = torch.arange(self.rows, device="cpu")

        def rows(shard: Any) -> torch.Tensor:
            found = torch.full((self.n,), -1, device="cpu")
            place = [part.shard for part in self.parts].index(shard) * self.rows
            found[place : place + self.rows] = numbers + (self.first if self.by_rows else 0)
            return found

        start = 0 if self.by_rows else self.first
        return build_layout(
            self.prefix,
            [(part.shard, part.scheme) for part in self.parts],
            rows,
            lambda _: torch.arange(start, start + self.k, device="cpu"),
            self.stored_k,
            self.n,
        )

    def register(self, layer: Any, arrived: Mapping[int, Arrived]) -> None:
        """Register what is loaded, stacked over the experts that are here.

        Args:
            layer: vLLM's.
            arrived: counts, by the expert's place here.
        """
        groups = self.k // self.weights.group_size
        scale = torch.int8 if self.spec.row_scaled else self.dtype
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            WEIGHT_PACKED: ((self.n, self.k // self.weights.codes_per_word), torch.int32),
            WEIGHT_SCALE: ((self.n, groups), scale),
        }
        if self.spec.row_scaled:
            shapes[WEIGHT_ROW_SCALE] = ((self.n, 1), self.dtype)
        tensors = {
            name: torch.empty(len(arrived), *shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
        if self.layout:
            for name, flat in zip(SIDECAR_DTYPES, self.layout.plan.zeros(), strict=True):
                tensors[name] = flat.repeat(len(arrived), 1)
        for name, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = self._loader(layer, name, arrived)  # type: ignore[attr-defined]
            layer.register_parameter(f"{self.stem}_{name}", parameter)

    def _loader(self, layer: Any, name: str, arrived: Mapping[int, Arrived]) -> Callable[..., bool]:
        place_of = layer._map_global_expert_id_to_local_expert_id
        loaders = {place: self._one_loader(name, counts) for place, counts in arrived.items()}

        def load(
            param: torch.Tensor,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            place = place_of(expert_id)
            if place < 0:
                return False
            loaders[place](param.data[place], loaded_weight, shard_id)
            return True

        return load

    def _one_loader(self, name: str, arrived: Arrived) -> Callable[..., None]:
        """Loads a tensor of one expert into its part of the stack."""
        if name in SIDECAR_DTYPES:
            assert self.layout is not None, "only a sidecar has these parameters"
            return tile_loader(self.prefix, name, self.layout, self.stored_k, arrived)
        return base_loader(
            self.prefix,
            name,
            self._copy,
            arrived,
            None,
            StoredBase(self.weights, self.stored_k // self.weights.group_size),
            keep=True,
            whole=True,
        )

    def _copy(self, param: torch.Tensor, values: torch.Tensor, shard: str) -> None:
        """This rank's part of a stored tensor of the base, into its rows of one expert."""
        place = [part.shard for part in self.parts].index(shard) * self.rows
        own = param[place : place + self.rows]
        if self.by_rows:
            own.copy_(values[self.first : self.first + self.rows])
        elif values.shape[1] == 1 and own.shape[1] == 1:  # of rows
            own.copy_(values)
        else:
            columns, per = own.shape[1], self.k // own.shape[1]
            own.copy_(values[:, self.first // per : self.first // per + columns])

    def prepare(self, layer: Any, kernel: LayerKernel, *, counted: bool) -> None:
        """Turn the loaded stacks into those that the kernel reads.

        Raises:
            SvskFormatError: scales or gains are not finite.
        """
        loaded = {
            name: getattr(layer, f"{self.stem}_{name}").data
            for name in (*base_names(self.weights), *(SIDECAR_DTYPES if self.layout else ()))
        }
        prepared: list[dict[str, torch.Tensor]] = []
        for place in range(len(loaded[WEIGHT_PACKED])):
            one: Any = torch.nn.Module()
            replace_parameters(one, {name: stack[place] for name, stack in loaded.items()})
            if counted:
                check_finite(f"{self.prefix}.{self.parts[0].names[place]}", one)
            if self.layout:
                clear_padding(one.sidecar_v.data, self.layout.plan)
            kernel.prepare(one)
            prepared.append({name: tensor.data for name, tensor in one.named_parameters()})
        for name in loaded:
            delattr(layer, f"{self.stem}_{name}")
        self.names = tuple(prepared[0])
        stacks = {f"{self.stem}_{n}": torch.stack([one[n] for one in prepared]) for n in self.names}
        replace_parameters(layer, stacks)

    def tensors(self, layer: Any) -> list[torch.Tensor]:
        """What the kernel reads."""
        return [getattr(layer, f"{self.stem}_{name}") for name in self.names]
