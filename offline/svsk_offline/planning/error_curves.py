# SPDX-License-Identifier: Apache-2.0
"""How the loss of one matrix falls with the bits spent on it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Final, Literal

import torch

from svsk_kernels.tile_grid import TileGrid
from svsk_offline.planning.bit_budget import Choice
from svsk_offline.quantizers.gptq import gptq, initial_scales
from svsk_offline.quantizers.hessian import ColumnOrder
from svsk_offline.quantizers.lowrank import truncated_svd
from svsk_offline.quantizers.rounding import nearest_levels
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.recipe import AllocationArgs, AlternatingArgs
from svsk_offline.recipe_sections import ranks_that_pay
from svsk_vllm.format import Codebook, ConfigGroup, LinearSpec, WeightArgs
from svsk_vllm.format.group_scales import GroupScales, ScaleBits

__all__ = ["CurveSettings", "ErrorCurve", "measure_curve", "scheme_with"]

_KEPT: Final = {8: 1.0, 4: 0.93}
"""Share of what a sidecar takes off that is left when its factors are rounded."""

_ALTERNATION: Final = 0.8
"""How much alternating adds.

After many rounds the share of the error that is left is that after one round, to the power 1.8.
Fitted to matrices of SmolLM2 at ranks 16 to 64 (docs/benchmarks/quality.md).
"""


@dataclass(frozen=True)
class CurveSettings:
    """All that an error curve depends on besides the matrix and its tokens.

    :func:`measure_curve` is given nothing else of a recipe, so curves can be kept by these values.

    Attributes:
        weights: the base whose error is measured; those of other bases are scaled from it.
        tile_m: rows of a sidecar's tile, 0 for all.
        tile_n: columns of a sidecar's tile, 0 for all.
        scales: see :class:`AlternatingArgs`.
        damping: see :class:`AlternatingArgs`.
        rank: the largest that may be chosen; None for the largest that pays in a matrix.
        bases: group sizes and scale bits that may be chosen; those that do not fit a matrix are
            left out of its curve.
        scale_dtype: stored dtype of scales.
    """

    weights: WeightArgs
    tile_m: int
    tile_n: int
    scales: Literal["search", "absmax"]
    damping: float
    rank: int | None
    bases: tuple[tuple[int, ScaleBits], ...]
    scale_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        scheme: ConfigGroup,
        args: AlternatingArgs,
        allocation: AllocationArgs,
        scale_dtype: torch.dtype,
    ) -> "CurveSettings":
        """Those of a recipe, where all matrices have one scheme before the budget is spent."""
        return cls(
            scheme.weights,
            scheme.sidecar.tile_m,
            scheme.sidecar.tile_n,
            args.scales,
            args.damping,
            None if allocation.ranks is None else max(allocation.ranks),
            tuple(product(allocation.group_sizes, allocation.scale_bits)),
            scale_dtype,
        )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; different settings have different ones."""
        raw = {field.name: getattr(self, field.name) for field in fields(self)}
        raw |= {"weights": self.weights.model_dump(mode="json"), "bases": list(self.bases)}
        return raw | {"scale_dtype": str(self.scale_dtype)}


@dataclass(frozen=True)
class ErrorCurve:
    """What was measured of one matrix, from which the loss of every choice follows.

    The loss is ``1/2 tr(D R H R^T)``, the matrix's share of the KL divergence when the Fisher
    information is taken apart into the factors H of the input and D of the output (diagonal). What
    a sidecar leaves of it is measured under the metric G that sidecars are fitted to.

    Attributes:
        loss: of the base alone that was measured.
        ratios: by group size and scale bits, how much larger the error of plain rounding is than
            with the base that was measured.
        shares: float32 [largest rank], the share of the error that the i-th rank of all tiles
            together takes off.
    """

    loss: float
    ratios: Mapping[tuple[int, ScaleBits], float]
    shares: torch.Tensor

    def choices(self, spec: LinearSpec, rounds: int, allocation: AllocationArgs) -> list[Choice]:
        """All ways to store the matrix that an allocation may choose from, with their losses.

        Args:
            spec: shape, and the scheme without allocation.
            rounds: of base and sidecar in turn.
            allocation: what may be chosen: bases of :attr:`ratios`, ranks up to the largest.
        """
        # From 1 at one round to 1 + _ALTERNATION at many; every two rounds bring half of the rest.
        power = 1 + _ALTERNATION * (1 - 0.5 ** ((rounds - 1) / 2))
        choices = []
        for base in product(allocation.group_sizes, allocation.scale_bits):
            if spec.k % base[0]:
                continue
            for rank in allocation.ranks_for(spec.grid):
                for bits in allocation.factor_bits if rank else allocation.factor_bits[:1]:
                    scheme = scheme_with(spec.scheme, base, rank, bits)
                    stored = replace(spec, scheme=scheme).stored_bits
                    # What rounded factors keep of the gain is an estimate, so it may exceed the
                    # whole.
                    left = max(1 - _KEPT[bits] * float(self.shares[:rank].sum()), 0.0)
                    loss = self.loss * self.ratios[base] * left**power
                    choices.append(Choice(*base, rank, bits, stored, loss))
        return choices


def measure_curve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    row_energy: torch.Tensor,
    metric: RowMetric,
    settings: CurveSettings,
    measured: torch.Tensor | None = None,
    felt: torch.Tensor | None = None,
) -> ErrorCurve:
    """Measure how the loss of a matrix falls with the bits spent on it.

    The error of the base is measured with the settings' own base and estimated with others from the
    error of plain rounding; the share of it that a sidecar of rank r takes off is that of the r
    largest squared singular values of ``C^T R L``, per tile, ``G = C C^T`` the metric.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], tokens weighted by their squared gradients.
        row_energy: float32 [N], ``E[g_n^2]``, the diagonal of D.
        metric: G, under which sidecars are fitted.
        settings: what is measured.
        measured: float32 [K, K], H of other tokens, on which losses are measured; None measures
            them on what was fitted, which is far too little where tokens are few.
        felt: float32 [N, N], G of other tokens in any unit, likewise; None measures shares under
            ``row_energy``.
    """
    measured = hessian if measured is None else measured
    felt = row_energy if felt is None else felt
    codebook = settings.weights.codebook
    own = settings.weights.group_size, settings.weights.scale_bits
    # Error feedback is run once, with the settings' base; all other bases are scaled from it.
    order = ColumnOrder.of(hessian, settings.damping)

    def scale_of(base: tuple[int, ScaleBits]) -> torch.Tensor:
        stored = GroupScales(settings.scale_dtype, base[1])
        return initial_scales(settings.scales, weight, order.importance, base[0], codebook, stored)

    scale = scale_of(own)
    residual = weight - gptq(weight, order, scale, codebook)[1]
    loss = 0.5 * float(((residual @ measured) * residual).sum(1) @ row_energy)
    reference = _rounding_error(weight, scale, order.importance, row_energy, codebook)
    n, k = weight.shape
    grid = TileGrid(n, k, settings.tile_m, settings.tile_n)
    rank = max(ranks_that_pay(grid)) if settings.rank is None else settings.rank
    shares = _rank_shares(residual, hessian, measured, metric, felt, grid, rank)
    ratios = {}
    for base in settings.bases:
        if k % base[0]:
            continue
        other = scale if base == own else scale_of(base)
        error = _rounding_error(weight, other, order.importance, row_energy, codebook)
        ratios[base] = error / reference if reference else 0.0
    return ErrorCurve(loss, ratios, shares)


def scheme_with(
    scheme: ConfigGroup, base: tuple[int, ScaleBits], rank: int, factor_bits: int
) -> ConfigGroup:
    """A scheme with some values replaced and checked again, so that what is written can be read."""
    raw = scheme.model_dump(mode="python")
    raw["weights"] |= {"group_size": base[0], "scale_bits": base[1]}
    raw["sidecar"] |= {"rank": rank, "num_bits": factor_bits}
    return ConfigGroup.model_validate(raw)


def _rounding_error(
    weight: torch.Tensor,
    scale: torch.Tensor,
    importance: torch.Tensor,
    row_energy: torch.Tensor,
    codebook: Codebook,
) -> float:
    """Error of plain rounding, columns weighted by what error feedback cannot make up for."""
    groups = weight.view(*scale.shape, -1)
    wide = scale.float().unsqueeze(-1)
    levels = nearest_levels(torch.where(wide == 0, 0.0, groups / wide), codebook)
    error = (groups - levels * wide).square().view(weight.shape) @ importance
    return float(error @ row_energy)


def _judged(felt: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """``G E`` of float32 [N, ...], G whole or, where it has one dimension, its diagonal."""
    return felt.unsqueeze(1) * error if felt.ndim == 1 else felt @ error


def _rank_shares(
    residual: torch.Tensor,
    hessian: torch.Tensor,
    measured: torch.Tensor,
    metric: RowMetric,
    felt: torch.Tensor,
    grid: TileGrid,
    rank: int,
) -> torch.Tensor:
    """Float32 [rank]: the share of the error that the i-th rank of all tiles together takes off.

    With ``H = F F^T`` and ``G = C C^T`` a tile's best factors of rank r under what is fitted are
    ``R F Q`` and ``Q^T F^-1``, Q the first r right singular vectors of ``C^T R F``. They are judged
    under what is measured: the error that the first r leave is that of ``R - sum p_i v_i^T``, whose
    terms are counted one by one, so ranks that only fit chance take off little, or add.

    The share is that of the tiles' own errors ``tr(G_a R_ab H_bb R_ab^T)``. With several column
    tiles these add up to more than ``tr(G R H R^T)``, because error feedback lets columns make up
    for one another across tiles.

    Args:
        residual: float32 [N, K].
        hessian: float32 [K, K], fitted.
        measured: float32 [K, K], of other tokens.
        metric: fitted.
        felt: float32 [N, N], the metric of other tokens, or [N], its diagonal.
        grid: the tiles.
        rank: the largest.
    """
    total = torch.zeros(rank)
    if not rank:
        return total
    error = 0.0
    for b in range(grid.num_col_tiles):
        columns = grid.col_slice(b)
        block = hessian[columns, columns]
        # Never used: its error is not felt, in whatever unit the others' is.
        if not bool(block.any()):
            continue
        # The default ridge of the fit; it only has to make the block decomposable.
        order = ColumnOrder.of(block, 1e-4)
        for a in range(grid.num_row_tiles):
            rows = grid.row_slice(a)
            tile, other = residual[rows, columns], measured[columns, columns]
            judge = felt[rows] if felt.ndim == 1 else felt[rows, rows]
            error += float((_judged(judge, tile) @ other * tile).sum())
            factored = order.factored(tile)
            right = truncated_svd(metric.part(rows).rooted(factored), rank)[2]
            left, vectors = factored @ right.T, order.unfactored(right)
            judged = _judged(judge, left)
            # Of the error of R - P V^T: the terms linear in each rank, and those of pairs.
            linear = ((judged.T @ tile @ other) * vectors).sum(1)
            pairs = (judged.T @ left) * (vectors @ other @ vectors.T)
            gains = 2 * linear - pairs.diagonal() - 2 * pairs.tril(-1).sum(1)
            total[: len(gains)] += gains.cpu()
    return total / error if error else total
