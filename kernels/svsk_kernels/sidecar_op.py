# SPDX-License-Identifier: Apache-2.0
"""The sidecar of a layer as one custom op, ``torch.ops.svsk.sidecar``.

Two batched matrix products over the tiles.

``z_b = (x_b V_b^T) * gain_b`` for every column tile b, then per row tile ``y = [z_1 ... z_B] [U_1
... U_B]^T``. No intermediate is larger than M x B x R.
"""

from collections.abc import Sequence
from typing import Final

import torch

from svsk_kernels.sidecar_plan import Bundle, SidecarPlan

__all__ = ["prepare_sidecar", "sidecar_matmul"]

_FACTOR_STEP: Final = 2.0**-7
"""Run-time factors are the stored integers times this, and gains are divided by its square.

A power of two keeps the integers exact in bfloat16 and float16, brings x V into the range of an
ordinary linear's output (float16 would overflow on integers), and gains of 1e-7 out of the range
where float16 products vanish.
"""


def prepare_sidecar(
    u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run-time factors and gains for :func:`sidecar_matmul`, from the loaded ones.

    Args:
        u: int8, flat, see :mod:`svsk_kernels.sidecar_plan`.
        v: int8, flat.
        gain: float32, flat.
        dtype: of the run-time factors, see :func:`svsk_kernels.cpu.processor.product_dtype`.

    Returns:
        U and V of ``dtype``, gain float32.
    """
    return u.to(dtype) * _FACTOR_STEP, v.to(dtype) * _FACTOR_STEP, gain / _FACTOR_STEP**2


def sidecar_matmul(
    x: torch.Tensor, u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, plan: Sequence[int]
) -> torch.Tensor:
    """Sidecar part of a layer's output.

    Products accumulate in float32; ``z`` is scaled by the gain in float32 and rounded to the
    factors' dtype.

    Args:
        x: [M, K], bfloat16, float16 or float32.
        u: flat U factors, as :func:`prepare_sidecar` makes them.
        v: flat V factors.
        gain: flat gains.
        plan: encoded :class:`SidecarPlan`.

    Returns:
        Contiguous [M, N] of the dtype of ``x``; rows (outputs) without a sidecar are zero.
    """
    where = SidecarPlan.decode(plan)
    m = x.shape[0]
    y = (x.new_empty if where.covers_all_rows else x.new_zeros)(m, where.n)
    if m == 0:
        return y
    work = x.to(u.dtype)
    parts = zip(
        where.bundles,
        where.u_bundles(u),
        where.v_bundles(v),
        where.gain_bundles(gain),
        strict=True,
    )
    for bundle, group_us, bundle_v, bundle_gain in parts:
        b = bundle.num_col_tiles
        z = torch.bmm(_column_tiles(work, bundle), bundle_v.transpose(1, 2))  # [B, M, R]
        # Gains differ by many powers of two: only their product with V x is of an ordinary size.
        z = (z.float() * bundle_gain.unsqueeze(1)).to(u.dtype)
        group_zs = z.split([group.slots * group.rank for group in bundle.groups], dim=2)
        for group, group_u, group_z in zip(bundle.groups, group_us, group_zs, strict=True):
            # One batch of products over the group's slots, each over all column tiles at once.
            part = group_z.view(b, m, group.slots, group.rank).permute(2, 1, 0, 3)
            left = part.reshape(group.slots, m, b * group.rank)
            out = torch.bmm(left, group_u.flatten(2).transpose(1, 2))  # [slots, M, rows]
            rows = y[:, group.row_start : group.row_stop].view(m, group.slots, group.rows)
            rows.copy_(out.transpose(0, 1))
    return y


def _column_tiles(x: torch.Tensor, bundle: Bundle) -> torch.Tensor:
    """``x`` [M, K] cut into its column tiles [B, M, width], narrow tiles padded with zeros."""
    m, b = x.shape[0], bundle.num_col_tiles
    if bundle.uniform:
        return x.reshape(m, b, bundle.width).transpose(0, 1)
    tiles = x.new_zeros(b, m, bundle.width)
    for columns, tile in bundle.column_tiles(tiles):
        tile.copy_(x[:, columns])
    return tiles


def _sidecar_fake(
    x: torch.Tensor, u: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, plan: Sequence[int]
) -> torch.Tensor:
    return x.new_empty(x.shape[0], plan[0])


_library = torch.library.Library("svsk", "FRAGMENT")
_library.define("sidecar(Tensor x, Tensor u, Tensor v, Tensor gain, int[] plan) -> Tensor")
_library.impl("sidecar", sidecar_matmul, "CompositeExplicitAutograd")
torch.library.register_fake("svsk::sidecar", _sidecar_fake, lib=_library)
