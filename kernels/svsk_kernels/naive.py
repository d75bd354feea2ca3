# SPDX-License-Identifier: Apache-2.0
"""What every kernel must compute, on plain tensors, written for reading."""

from dataclasses import dataclass
from typing import Literal

import torch

from svsk_kernels.codebook import Codebook, code_values
from svsk_kernels.tile_grid import TileGrid

__all__ = ["PlainLinear", "naive_matmul", "naive_sidecar", "round_activations"]

_SCALE_COLUMNS = 64  # activations of 8 bits that share a row's scale


@dataclass(frozen=True)
class PlainLinear:
    """One quantised linear, unpacked. N outputs, K inputs, groups of g weights, rank r.

    The sidecar has A rows and B columns of tiles; ``u``, ``v`` and ``gain`` are None without one.
    """

    codes: torch.Tensor  # int8 [N, K], values in [-8, 7], or of 8 bits
    scale: torch.Tensor  # float [N, K / g]; int8 where row_scale is given
    codebook: Codebook
    grid: TileGrid  # how the weight is cut into tiles
    u: torch.Tensor | None = None  # int8 [N, B, r]
    v: torch.Tensor | None = None  # int8 [A, r, K]
    gain: torch.Tensor | None = None  # float32 [A, B, r]
    factor_bits: Literal[4, 8] = 8  # that u and v fit in
    row_scale: torch.Tensor | None = None  # float [N, 1]: times scale; None for no second level

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the sidecar per tile, 0 for none."""
        return 0 if self.v is None else self.v.shape[1]


def naive_sidecar(x: torch.Tensor, linear: PlainLinear) -> torch.Tensor:
    """Contribution of the sidecar to ``y = x W_hat^T``, tile by tile, in float64.

    ``y[:, rows of a] += sum_b ((x[:, columns of b] V_ab^T) * gain_ab) U_ab^T``

    Args:
        x: floating [M, K].
        linear: the quantised linear.

    Returns:
        float64 [M, N]; zeros when the rank is 0.
    """
    grid = linear.grid
    y = torch.zeros(x.shape[0], grid.n, dtype=torch.float64, device=x.device)
    if linear.u is None or linear.v is None or linear.gain is None:
        return y
    for a in range(grid.num_row_tiles):
        rows = grid.row_slice(a)
        for b in range(grid.num_col_tiles):
            cols = grid.col_slice(b)
            z = x[:, cols].double() @ linear.v[a, :, cols].double().T
            y[:, rows] += (z * linear.gain[a, b].double()) @ linear.u[rows, b].double().T
    return y


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """What activations of 8 bits hold: ``s * round(x / s)``.

    s is the largest magnitude of a row's 64 columns over 127, in float32, ties go to the even
    number.

    Args:
        x: floating [M, K].

    Returns:
        float64 [M, K].
    """
    parts = []
    for part in x.float().split(_SCALE_COLUMNS, dim=1):
        scale = part.abs().amax(1, keepdim=True) / 127
        scale = scale.where(scale != 0, 1)
        parts.append((part / scale).round().double() * scale.double())
    return torch.cat(parts, dim=1)


def naive_matmul(
    x: torch.Tensor,
    linear: PlainLinear,
    bias: torch.Tensor | None = None,
    *,
    int8: bool = False,
) -> torch.Tensor:
    """``y = x W_hat^T + bias`` in float64.

    Args:
        x: floating [M, K].
        linear: the quantised linear.
        bias: [N] or None.
        int8: the base takes activations of 8 bits; the sidecar takes them as they are.

    Returns:
        float64 [M, N].
    """
    n, k = linear.codes.shape
    levels = code_values(linear.codes, linear.codebook, torch.float64).view(
        n, -1, linear.group_size
    )
    scale = linear.scale.double()
    if linear.row_scale is not None:
        scale = scale * linear.row_scale.double()
    base = (levels * scale.unsqueeze(-1)).view(n, k)
    y = (round_activations(x) if int8 else x.double()) @ base.T + naive_sidecar(x, linear)
    return y if bias is None else y + bias.double()
