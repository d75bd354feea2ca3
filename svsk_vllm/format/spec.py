# SPDX-License-Identifier: Apache-2.0
"""Which tensors a quantised linear stores, with their dtypes and shapes."""

from dataclasses import dataclass
from typing import Final

import torch

from svsk_kernels.tile_grid import TileGrid
from svsk_vllm.format.config import ONE_LEVEL, ConfigGroup
from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.group_scales import GroupScales, stored_scale_columns
from svsk_vllm.format.suffixes import (
    SIDECAR_GAIN,
    SIDECAR_U,
    SIDECAR_V,
    WEIGHT_HOT_PACKED,
    WEIGHT_HOT_ROWS,
    WEIGHT_HOT_SCALE,
    WEIGHT_PACKED,
    WEIGHT_ROW_SCALE,
    WEIGHT_SCALE,
)

__all__ = ["SCALE_DTYPES", "LinearSpec", "TensorSpec"]

SCALE_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bits(self) -> int:
        """Stored size in bits."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize * 8


@dataclass(frozen=True)
class LinearSpec:
    """A quantised linear: its name, shape [n, k] = [out, in], and scheme.

    Raises:
        SvskFormatError: a dimension is not positive, ``k`` is not a multiple of the group size, all
            rows are hot, or the scale dtype is not a float of 16 or 32 bits. The message names the
            module.
    """

    name: str
    n: int
    k: int
    scheme: ConfigGroup
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise SvskFormatError(
                f"{self.name}: weight of shape [{self.n}, {self.k}]: both sizes must be positive."
            )
        group = self.scheme.weights.group_size
        if self.k % group:
            smaller = next((size for size in (32, 16) if size < group and not self.k % size), None)
            hint = f"use group_size {smaller}, or " if smaller else ""
            raise SvskFormatError(
                f"{self.name}: K = {self.k} input features is not a multiple of the group size"
                f" {group}; {hint}add the module to the ignore list."
            )
        if self.scheme.weights.hot_rows >= self.n:
            raise SvskFormatError(
                f"{self.name}: hot_rows {self.scheme.weights.hot_rows} of {self.n} rows: expected"
                " fewer. Codebook int8 stores all rows in 8 bits."
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise SvskFormatError(
                f"{self.name}: scales of {self.scale_dtype}: expected one of {SCALE_DTYPES}."
            )

    @property
    def grid(self) -> TileGrid:
        """Tile grid of the sidecar."""
        return TileGrid(self.n, self.k, self.scheme.sidecar.tile_m, self.scheme.sidecar.tile_n)

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.scheme.weights.group_size

    @property
    def scales(self) -> GroupScales:
        """How the groups' scales are stored."""
        return GroupScales(self.scale_dtype, self.scheme.weights.scale_bits)

    @property
    def rank(self) -> int:
        """Rank of the sidecar per tile, 0 for none."""
        return self.scheme.sidecar.rank

    @property
    def factor_bits(self) -> int:
        """Bits of a sidecar factor, 8 or 4."""
        return self.scheme.sidecar.num_bits

    def tensors(self) -> dict[str, TensorSpec]:
        """Stored tensors by suffix, in the order of docs/format.md."""
        groups, bits = self.k // self.group_size, self.scheme.weights.scale_bits
        words = self.k // self.scheme.weights.codes_per_word
        hot = self.scheme.weights.hot_rows
        specs = {WEIGHT_PACKED: TensorSpec(torch.int32, (self.n - hot, words))}
        if bits == ONE_LEVEL:
            specs[WEIGHT_SCALE] = TensorSpec(self.scale_dtype, (self.n - hot, groups))
        else:
            stored = torch.int8 if bits == 8 else torch.uint8
            columns = stored_scale_columns(groups, bits)
            specs[WEIGHT_SCALE] = TensorSpec(stored, (self.n, columns))
            specs[WEIGHT_ROW_SCALE] = TensorSpec(self.scale_dtype, (self.n, 1))
        if hot:
            specs[WEIGHT_HOT_ROWS] = TensorSpec(torch.int32, (hot,))
            specs[WEIGHT_HOT_PACKED] = TensorSpec(torch.int32, (hot, self.k // 4))
            specs[WEIGHT_HOT_SCALE] = TensorSpec(self.scale_dtype, (hot, groups))
        if self.rank:
            grid, r = self.grid, self.rank
            dtype, per_byte = (torch.int8, 1) if self.factor_bits == 8 else (torch.uint8, 2)
            specs[SIDECAR_U] = TensorSpec(dtype, (self.n, grid.num_col_tiles, r // per_byte))
            specs[SIDECAR_V] = TensorSpec(dtype, (grid.num_row_tiles, r, self.k // per_byte))
            specs[SIDECAR_GAIN] = TensorSpec(
                torch.float32, (grid.num_row_tiles, grid.num_col_tiles, r)
            )
        return specs

    @property
    def num_weights(self) -> int:
        """Number of weights, ``n * k``."""
        return self.n * self.k

    @property
    def stored_bits(self) -> int:
        """Every stored bit of this linear, bias excluded."""
        return sum(spec.num_bits for spec in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.stored_bits / self.num_weights
