# SPDX-License-Identifier: Apache-2.0
"""How the loss of one matrix falls with the bits spent on it."""

from itertools import product
from typing import Final

import torch

from svsk_offline.planning.bit_budget import Choice
from svsk_offline.quantizers.gptq import gptq, initial_scales
from svsk_offline.quantizers.hessian import ColumnOrder
from svsk_offline.quantizers.lowrank import truncated_svd
from svsk_offline.quantizers.rounding import nearest_levels
from svsk_offline.recipe import AllocationArgs, AlternatingArgs
from svsk_vllm.format import ConfigGroup, LinearSpec
from svsk_vllm.format.group_scales import GroupScales, ScaleBits

__all__ = ["choices_of", "scheme_with"]

_KEPT: Final = {8: 1.0, 4: 0.93}
"""Share of what a sidecar takes off that is left when its factors are rounded."""

_ALTERNATION: Final = 0.8
"""How much alternating adds.

After many rounds the share of the error that is left is that after one round, to the power 1.8.
Fitted to matrices of SmolLM2 at ranks 16 to 64 (docs/benchmarks/quality.md).
"""


def choices_of(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    row_energy: torch.Tensor,
    spec: LinearSpec,
    args: AlternatingArgs,
    allocation: AllocationArgs,
    measured: torch.Tensor | None = None,
) -> list[Choice]:
    """All ways to store a matrix that an allocation may choose from, with their losses.

    The loss is ``1/2 tr(D R H R^T)``, the matrix's share of the KL divergence when the Fisher
    information is taken apart into the factors H of the input and D of the output (diagonal). The
    error of the base is measured at the scheme's group size and estimated at others from the error
    of plain rounding; the share of it that a sidecar of rank r takes off is that of the r largest
    squared singular values of ``D^1/2 R L``, per tile.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], tokens weighted by their squared gradients.
        row_energy: float32 [N], ``E[g_n^2]``, the diagonal of D.
        spec: shape, and the scheme without allocation.
        args: settings of the method.
        allocation: what may be chosen.
        measured: float32 [K, K], H of other tokens, on which losses are measured; None measures
            them on what was fitted, which is far too little where tokens are few.
    """
    measured = hessian if measured is None else measured
    scheme = spec.scheme
    # Error feedback is run once, at the scheme's group size; all other sizes are scaled from it.
    order = ColumnOrder.of(hessian, args.damping)
    codebook, dtype = scheme.weights.codebook, spec.scale_dtype
    scale = initial_scales(
        args.scales, weight, order.importance, spec.group_size, codebook, spec.scales
    )
    residual = weight - gptq(weight, order, scale, codebook)[1]
    loss = 0.5 * float(((residual @ measured) * residual).sum(1) @ row_energy)
    reference = _rounding_error(weight, scale, order.importance, row_energy, spec)
    shares = _rank_shares(residual, hessian, measured, row_energy, spec, max(allocation.ranks))
    # From 1 at one round to 1 + _ALTERNATION at many; every two rounds bring half of the rest.
    power = 1 + _ALTERNATION * (1 - 0.5 ** ((args.rounds - 1) / 2))
    choices = []
    for size, scale_bits in product(allocation.group_sizes, allocation.scale_bits):
        if spec.k % size:
            continue
        other = scale
        if (size, scale_bits) != (spec.group_size, scheme.weights.scale_bits):
            other = initial_scales(
                args.scales,
                weight,
                order.importance,
                size,
                codebook,
                GroupScales(dtype, scale_bits),
            )
        ratio = (
            _rounding_error(weight, other, order.importance, row_energy, spec) / reference
            if reference
            else 0.0
        )
        for rank in allocation.ranks:
            for bits in allocation.factor_bits if rank else allocation.factor_bits[:1]:
                stored = LinearSpec(
                    spec.name,
                    spec.n,
                    spec.k,
                    scheme_with(scheme, (size, scale_bits), rank, bits),
                    dtype,
                ).stored_bits
                # What rounded factors keep of the gain is an estimate, so it may exceed the whole.
                left = max(1 - _KEPT[bits] * float(shares[:rank].sum()), 0.0)
                choices.append(
                    Choice(size, scale_bits, rank, bits, stored, loss * ratio * left**power)
                )
    return choices


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
    spec: LinearSpec,
) -> float:
    """Error of plain rounding, columns weighted by what error feedback cannot make up for."""
    groups = weight.view(spec.n, scale.shape[1], -1)
    wide = scale.float().unsqueeze(-1)
    levels = nearest_levels(
        torch.where(wide == 0, 0.0, groups / wide), spec.scheme.weights.codebook
    )
    error = (groups - levels * wide).square().view(spec.n, spec.k) @ importance
    return float(error @ row_energy)


def _rank_shares(
    residual: torch.Tensor,
    hessian: torch.Tensor,
    measured: torch.Tensor,
    row_energy: torch.Tensor,
    spec: LinearSpec,
    rank: int,
) -> torch.Tensor:
    """Float32 [rank]: the share of the error that the i-th rank of all tiles together takes off.

    A tile's best factors of rank r under the fitted Hessian leave ``(I - Q Q^T) D^1/2 R``, Q the
    first r left singular vectors of ``D^1/2 R F`` with ``H = F F^T``: so what each takes off is
    known under any other Hessian, here the measured one.

    The share is that of the tiles' own errors ``tr(D_a R_ab H_bb R_ab^T)``. With several column
    tiles these add up to more than ``tr(D R H R^T)``, because error feedback lets columns make up
    for one another across tiles.
    """
    total = torch.zeros(rank)
    if not rank:
        return total
    error = 0.0
    grid = spec.grid
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
            weighted = residual[rows, columns] * row_energy[rows].sqrt().unsqueeze(1)
            other = measured[columns, columns]
            error += float(((weighted @ other) * weighted).sum())
            taken = truncated_svd(order.factored(weighted), rank)[0].T @ weighted
            gains = ((taken @ other) * taken).sum(1).cpu()
            total[: len(gains)] += gains
    return total / error if error else total
