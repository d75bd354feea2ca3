# SPDX-License-Identifier: Apache-2.0
"""What groups finer than 64 weights cost a GPU that decodes, by the prediction of the kernels."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from svsk_kernels.gpu.predicted_time import GPUS, Layer, Sidecar
from svsk_kernels.gpu.rule import least_time
from svsk_kernels.tile_grid import TileGrid
from svsk_vllm.format.config import ONE_LEVEL, ConfigGroup
from svsk_vllm.format.contents import Contents

__all__ = ["finer_groups", "finer_groups_line"]

_COARSEST: Final = 64
_WORTH_SAYING: Final = 0.05
"""Share of the time of a token that finer groups may cost without a word."""


def finer_groups(folder: Path) -> dict[str, float]:
    """How much longer decoding a token takes than if all groups had 64 weights, by GPU.

    A share of the time of all linears with codes of 4 bits, each a product of its own, by bytes and
    instructions (:mod:`svsk_kernels.gpu.predicted_time`): predicted, not measured. Of experts all
    are counted. Empty where no group is finer, or nothing has codes of 4 bits.

    Args:
        folder: a checkpoint.

    Raises:
        SvskFormatError: it is none that this package reads.
    """
    linears = Contents(folder).linears.values()
    kinds = Counter(
        _layer(linear.n, linear.k, linear.scheme)
        for linear in linears
        if linear.scheme.weights.joined_codebook != "int8"
    )
    if all(layer.group_size == _COARSEST for layer in kinds):
        return {}
    coarse: Counter[Layer] = Counter()
    for layer, count in kinds.items():
        coarse[layer.regrouped(_COARSEST)] += count
    found = {}
    for name, speeds in GPUS.items():
        stored, best = (
            sum(least_time(speeds, layer, 1) * count for layer, count in counted.items())
            for counted in (kinds, coarse)
        )
        found[name] = stored / best - 1
    return found


def finer_groups_line(more: Mapping[str, float]) -> str | None:
    """What the summary of a run says of :func:`finer_groups`; None where it is not worth a line."""
    named = [f"{share:.0%} on {gpu}" for gpu, share in more.items() if share > _WORTH_SAYING]
    if not named:
        return None
    return (
        f"groups finer than {_COARSEST}: decoding is predicted to take {', '.join(named)} longer"
        f" than with groups of {_COARSEST}"
    )


def _layer(n: int, k: int, scheme: ConfigGroup) -> Layer:
    side, weights = scheme.sidecar, scheme.weights
    grid = TileGrid(n, k, side.tile_m, side.tile_n)
    sidecar = None
    if side.rank:
        sidecar = Sidecar(side.rank, side.num_bits, grid.num_row_tiles, grid.num_col_tiles)
    two_levels = weights.scale_bits != ONE_LEVEL
    return Layer(n, k, weights.group_size, two_levels, weights.codebook == "quad8", sidecar)
