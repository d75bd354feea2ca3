# SPDX-License-Identifier: Apache-2.0
"""Loaders of a layer's parameters: they count what arrives, and refuse what was changed.

Those of the base pass on to the layer's own. Those of the sidecar copy this rank's tiles to their
places in flat tensors of exact integers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from svsk_kernels.sidecar_plan import SidecarPlan
from svsk_vllm.format import ConfigGroup, SvskFormatError, WeightArgs, unpack_factors
from svsk_vllm.format.group_scales import ONE_LEVEL, row_scale_problem, unpack_scale_codes
from svsk_vllm.format.spec import SCALE_DTYPES
from svsk_vllm.format.suffixes import (
    WEIGHT_HOT_PACKED,
    WEIGHT_HOT_ROWS,
    WEIGHT_HOT_SCALE,
    WEIGHT_PACKED,
    WEIGHT_ROW_SCALE,
    WEIGHT_SCALE,
)
from svsk_vllm.plugin.arrival import loaded_shards, stored_tensor
from svsk_vllm.plugin.shard_probe import ShardId
from svsk_vllm.plugin.sidecar_layout import PartLayout, SidecarLayout

__all__ = [
    "SIDECAR_DTYPES",
    "Arrived",
    "StoredBase",
    "base_loader",
    "base_names",
    "clear_padding",
    "require_dtype",
    "require_shape",
    "same_rows",
    "tile_loader",
]

SIDECAR_DTYPES = {"sidecar_u": torch.int8, "sidecar_v": torch.int8, "sidecar_gain": torch.float32}
"""The loaded parameters, flat in the order of :mod:`svsk_kernels.sidecar_plan`."""


def base_names(weights: WeightArgs) -> tuple[str, ...]:
    """The base's parameters: loaded by vLLM's own loaders, but for tables with hot rows."""
    if weights.hot_rows:
        return (
            WEIGHT_PACKED,
            WEIGHT_SCALE,
            WEIGHT_HOT_ROWS,
            WEIGHT_HOT_PACKED,
            WEIGHT_HOT_SCALE,
        )
    if weights.scale_bits == ONE_LEVEL:
        return (WEIGHT_PACKED, WEIGHT_SCALE)
    return (WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_ROW_SCALE)


class Arrived:
    """The tensors of a layer that were loaded.

    Args:
        parts: names of its parts in the checkpoint, by vLLM's shard ids.
        schemes: their schemes, in the same order.
    """

    def __init__(self, parts: Mapping[ShardId, str], schemes: Sequence[ConfigGroup]) -> None:
        self._expected: dict[tuple[ShardId, str], str] = {}
        for (shard, part), scheme in zip(parts.items(), schemes, strict=True):
            for name in base_names(scheme.weights):
                # vLLM passes a tensor of several shards on shard by shard.
                for one in loaded_shards(shard):
                    self._expected[one, name] = f"{part}.{name}"
            for name in SIDECAR_DTYPES if scheme.sidecar.rank else ():
                self._expected[shard, name] = f"{part}.{name}"
        self._seen: set[tuple[ShardId, str]] = set()

    def note(self, name: str, shards: Sequence[ShardId]) -> None:
        """Parameter ``name`` was loaded for some shards."""
        self._seen.update((shard, name) for shard in shards)

    def check(self, prefix: str) -> None:
        """Forget what was loaded, for the next time.

        Raises:
            SvskFormatError: something was not.
        """
        seen, self._seen = self._seen, set()
        missing = dict.fromkeys(n for key, n in self._expected.items() if key not in seen)
        if not missing:
            return
        known = {one for shard, _ in self._expected for one in (shard, *loaded_shards(shard))}
        if unknown := {shard for shard, _ in seen} - known:
            raise SvskFormatError(_unknown_parts(prefix, unknown))
        raise SvskFormatError(
            f"{prefix}: not loaded: {', '.join(missing)}. The checkpoint is incomplete, or does not"
            " fit its config.json: copy or download the folder again; `svsk validate` lists what"
            " is missing."
        )


def _unknown_parts(prefix: str, shards: set[ShardId]) -> str:
    return (
        f"{prefix}: vLLM loads it in parts ({', '.join(map(repr, sorted(shards, key=repr)))}), but"
        " its model class does not say which linears it fuses there (packed_modules_mapping), and"
        " none of the usual names is stored. The plugin cannot serve it quantised: put the linears"
        f" of {prefix} on the ignore list (--ignore)."
    )


@dataclass(frozen=True)
class StoredBase:
    """How the checkpoint holds the base of a layer's parts.

    Attributes:
        weights: the parts' scheme.
        groups: of a whole stored row.
    """

    weights: WeightArgs
    groups: int

    def dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        """Those that parameter ``name`` may be stored in."""
        bits = self.weights.scale_bits
        if name == WEIGHT_PACKED:
            return (torch.int32,)
        if name == WEIGHT_SCALE and bits != ONE_LEVEL:
            return (torch.int8 if bits == 8 else torch.uint8,)
        return SCALE_DTYPES

    def unpack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the layer's own loader is given: 6-bit codes of scales as int8 [rows, groups].

        A loader divides columns among ranks, and shares of packed codes need not be whole bytes.
        """
        bits = self.weights.scale_bits
        if name != WEIGHT_SCALE or bits == ONE_LEVEL:
            return tensor
        if bits == 6 and tensor.dtype == torch.int8:
            tensor = tensor.view(torch.uint8)  # see arrival.py
        return unpack_scale_codes(tensor, bits, self.groups)

    def value_problem(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
        """What is wrong with row scales that are served in ``dtype``, and what to do about it."""
        if name != WEIGHT_ROW_SCALE:
            return None
        if problem := row_scale_problem(tensor, self.weights.scale_bits):
            return f"{problem}. Run `svsk validate` on the folder"
        # A row scale that is exact has exact products: those that overflow are found when all
        # codes are there.
        if bad := int((tensor.to(dtype).double() != tensor.double()).sum()):
            return (
                f"{bad} of {tensor.numel()} values are not exact in {dtype}. Serve the checkpoint"
                f" in the dtype it is stored in, {tensor.dtype} (--dtype)"
            )
        return None


def base_loader(
    prefix: str,
    name: str,
    loader: Callable[..., Any],
    arrived: Arrived,
    order: torch.Tensor | None,
    base: StoredBase,
    *,
    keep: bool,
    whole: bool,
) -> Callable[..., None]:
    """Weight loader of a parameter of the base: the layer's own, with checks.

    Args:
        prefix: the layer's name.
        name: the parameter's.
        loader: the layer's own loader.
        arrived: counts.
        order: stored row of each row that has to arrive, None for the stored order.
        base: how it is stored.
        keep: whether the order is checked.
        whole: whether a tensor has to arrive as a whole, as it has with a sidecar, which is not
            split with it.
    """

    def load(param: torch.Tensor, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
        stored = stored_tensor(loaded_weight, name)
        if stored is not None:
            require_dtype(stored.name, stored.dtype, *base.dtypes(name))
            if keep and not same_rows(stored.tensor, loaded_weight, order, whole=whole):
                raise SvskFormatError(
                    f"{stored.name}: vLLM's loader for this architecture changes its rows before"
                    f" {prefix} gets them, in a way that the plugin does not know. Put the module"
                    " on the ignore list (--ignore) when quantising."
                )
        label = stored.name if stored is not None else f"{prefix}.{name}"
        try:
            values = base.unpack(name, loaded_weight)
        except SvskFormatError as error:
            raise SvskFormatError(
                f"{label}: cannot be unpacked: {error} Run `svsk validate` on the folder."
            ) from error
        if problem := base.value_problem(name, values, param.dtype):
            raise SvskFormatError(f"{label}: {problem}.")
        loader(param, values, *(() if loaded_shard_id is None else (loaded_shard_id,)))
        arrived.note(name, loaded_shards(loaded_shard_id))

    return load


def same_rows(
    stored: torch.Tensor, arrived: torch.Tensor, order: torch.Tensor | None, *, whole: bool
) -> bool:
    """Whether a loader was given what is stored, in the order that is expected.

    Args:
        stored: as vLLM read it.
        arrived: as the layer's loader got it.
        order: stored row of each row that has to arrive, None for the stored order.
        whole: whether all of it has to arrive.
    """
    same_memory = stored.untyped_storage().data_ptr() == arrived.untyped_storage().data_ptr()
    if (
        same_memory
        and not whole
        and arrived.stride() == stored.stride()
        and arrived.shape[1:] == stored.shape[1:]
    ):
        return True  # a run of rows
    if stored.shape != arrived.shape:
        return False
    if order is None:
        start = stored.storage_offset()
        if same_memory and (arrived.stride(), arrived.storage_offset()) == (stored.stride(), start):
            return True
        return torch.equal(stored, arrived)
    return len(order) == len(stored) and torch.equal(stored[order.to(stored.device)], arrived)


def require_dtype(name: str, dtype: torch.dtype, *expected: torch.dtype) -> None:
    """Refuse a stored tensor of another dtype than the scheme's.

    Raises:
        SvskFormatError: it is.
    """
    if dtype not in expected:
        raise SvskFormatError(
            f"{name}: values of dtype {dtype}, expected {' or '.join(map(str, expected))}. Run"
            " `svsk validate` on the folder."
        )


def tile_loader(
    prefix: str, name: str, layout: SidecarLayout, input_size: int, arrived: Arrived | None = None
) -> Callable[..., None]:
    """Weight loader of one sidecar tensor.

    Copies this rank's tiles to their place in the flat parameter.

    vLLM's reload counts ``copy_`` calls and looks for an argument called ``param``. The closure
    must not hold the layer, which would keep it alive.
    """
    copy = {"sidecar_u": _copy_u, "sidecar_v": _copy_v, "sidecar_gain": _copy_gain}[name]

    def load(
        param: torch.Tensor, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None
    ) -> None:
        part = layout.parts.get(loaded_shard_id)
        if part is None:
            if loaded_shard_id is not None and None in layout.parts:
                raise SvskFormatError(_unknown_parts(prefix, {loaded_shard_id}))
            raise SvskFormatError(
                f"{prefix}.{name}: loaded for part {loaded_shard_id!r}, but by config.json there"
                f" are sidecars for {list(layout.parts)} only. Run `svsk validate` on the folder."
            )
        stored = stored_tensor(loaded_weight, name)
        if stored is not None:
            packed = name != "sidecar_gain" and part.sidecar.num_bits == 4
            require_dtype(
                stored.name, stored.dtype, torch.uint8 if packed else SIDECAR_DTYPES[name]
            )
            if not same_rows(stored.tensor, loaded_weight, None, whole=True):
                raise SvskFormatError(
                    f"{stored.name}: vLLM's loader for this architecture changes it before {prefix}"
                    " gets it. Quantise the module without a sidecar (rank 0), or put it on the"
                    " ignore list (--ignore)."
                )
        if name != "sidecar_gain":
            if part.sidecar.num_bits == 4 and loaded_weight.dtype == torch.int8:
                loaded_weight = loaded_weight.view(torch.uint8)  # see arrival.py
            loaded_weight = unpack_factors(loaded_weight, part.sidecar.num_bits)
        rank, tiles = part.sidecar.rank, -(-input_size // part.tile_n)
        inner = (rank, input_size) if name == "sidecar_v" else (tiles, rank)
        require_shape(f"{prefix}.{name}", loaded_weight, (len(loaded_weight), *inner))
        copy(param.data, loaded_weight, layout.plan, part)
        if arrived is not None:
            arrived.note(name, (loaded_shard_id,))

    return load


def _copy_u(data: torch.Tensor, source: torch.Tensor, plan: SidecarPlan, part: PartLayout) -> None:
    """From int8 [N, B, r]."""
    views = plan.u_slots(data)
    for slot in part.slots:
        view = views[slot.index]
        view.copy_(source[slot.row : slot.row + len(view), part.tile_columns])


def _copy_v(data: torch.Tensor, source: torch.Tensor, plan: SidecarPlan, part: PartLayout) -> None:
    """From int8 [A, r, K]."""
    views = plan.v_slots(data)
    for slot in part.slots:
        held = source[slot.tile, :, part.col_start :]
        for columns, tile in part.bundle.column_tiles(views[slot.index]):
            tile.copy_(held[:, columns])


def _copy_gain(
    data: torch.Tensor, source: torch.Tensor, plan: SidecarPlan, part: PartLayout
) -> None:
    """From float32 [A, B, r]."""
    views = plan.gain_slots(data)
    for slot in part.slots:
        views[slot.index].copy_(source[slot.tile, part.tile_columns])


def require_shape(name: str, source: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the scheme's.

    Raises:
        SvskFormatError: it is.
    """
    if tuple(source.shape) != shape:
        raise SvskFormatError(
            f"{name}: the checkpoint holds shape {list(source.shape)}, its config.json asks for"
            f" {list(shape)} (4-bit factors unpacked). Run `svsk validate` on the folder."
        )


def clear_padding(v: torch.Tensor, plan: SidecarPlan) -> None:
    """Zero the columns beyond narrow tiles: a reload starts from uninitialised memory."""
    for bundle, view in zip(plan.bundles, plan.v_bundles(v), strict=True):
        for tile, (start, stop) in zip(view, pairwise(bundle.bounds), strict=True):
            tile[:, stop - start :].zero_()
