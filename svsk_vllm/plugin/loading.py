# SPDX-License-Identifier: Apache-2.0
"""Loaders of the sidecar's parameters: this rank's tiles, to their places in flat tensors of exact integers."""

from collections.abc import Callable
from itertools import pairwise

import torch

from svsk_vllm.format import SvskFormatError, unpack_factors
from svsk_vllm.plugin.sharding import PartLayout, ShardId, SidecarLayout

__all__ = ["SIDECAR_DTYPES", "clear_padding", "tile_loader"]

SIDECAR_DTYPES = {"sidecar_u": torch.int8, "sidecar_v": torch.int8, "sidecar_gain": torch.float32}
"""The loaded parameters, flat in the order of :mod:`svsk_kernels.plan`."""


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
        place.copy_(rows)


def _copy_v(data: torch.Tensor, source: torch.Tensor, part: PartLayout, name: str, input_size: int) -> None:
    """From int8 [A, r, K]."""
    bundle, rank = part.bundle, part.sidecar.rank
    _require(name, source, (source.shape[0], rank, input_size))
    tiles = data.narrow(0, part.v_start, bundle.v_numel).view(bundle.v_shape)
    for slot in part.slots:
        for index, (start, stop) in enumerate(pairwise(bundle.bounds)):
            place = tiles[index, slot.rank_start : slot.rank_start + rank, : stop - start]
            columns = source[slot.tile, :, part.col_start + start : part.col_start + stop]
            place.copy_(columns)


def _copy_gain(data: torch.Tensor, source: torch.Tensor, part: PartLayout, name: str, input_size: int) -> None:
    """From float32 [A, B, r]."""
    shape, rank = part.bundle.gain_shape, part.sidecar.rank
    _require(name, source, (source.shape[0], -(-input_size // part.tile_n), rank))
    gains = data.narrow(0, part.gain_start, part.bundle.gain_numel).view(shape)
    for slot in part.slots:
        place = gains[:, slot.rank_start : slot.rank_start + rank]
        place.copy_(source[slot.tile, part.first_tile : part.first_tile + shape[0]])


def _require(name: str, source: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(source.shape) != shape:
        raise SvskFormatError(
            f"{name}: the checkpoint holds shape {list(source.shape)}, its config.json asks for {list(shape)} "
            "(4-bit factors unpacked). Run `svsk validate` on the folder."
        )


def clear_padding(v: torch.Tensor, layout: SidecarLayout) -> None:
    """Zero the columns beyond narrow tiles: a reload starts from uninitialised memory."""
    start = 0
    for bundle in layout.plan.bundles:
        tiles = v.narrow(0, start, bundle.v_numel).view(bundle.v_shape)
        for index, (first, last) in enumerate(pairwise(bundle.bounds)):
            tiles[index, :, last - first :].zero_()
        start += tiles.numel()
