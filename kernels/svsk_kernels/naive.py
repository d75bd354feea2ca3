# SPDX-License-Identifier: Apache-2.0
"""What every kernel must compute, written for reading."""

import torch

from svsk_vllm.format import QuantizedLinear, code_values

__all__ = ["naive_matmul", "naive_sidecar"]


def naive_sidecar(x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    """Contribution of the sidecar to ``y = x W_hat^T``, tile by tile, in float64.

    ``y[:, rows of a] += sum_b ((x[:, columns of b] V_ab^T) * gain_ab) U_ab^T``

    Args:
        x: floating [M, K].
        linear: the quantised linear.

    Returns:
        float64 [M, N]; zeros when the rank is 0.
    """
    spec = linear.spec
    y = torch.zeros(x.shape[0], spec.n, dtype=torch.float64, device=x.device)
    if linear.u is None or linear.v is None or linear.gain is None:
        return y
    for a in range(spec.grid.num_row_tiles):
        rows = spec.grid.row_slice(a)
        for b in range(spec.grid.num_col_tiles):
            cols = spec.grid.col_slice(b)
            z = x[:, cols].double() @ linear.v[a, :, cols].double().T
            y[:, rows] += (z * linear.gain[a, b].double()) @ linear.u[rows, b].double().T
    return y


def naive_matmul(x: torch.Tensor, linear: QuantizedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x W_hat^T + bias`` in float64.

    Args:
        x: floating [M, K].
        linear: the quantised linear.
        bias: [N] or None.

    Returns:
        float64 [M, N].
    """
    spec = linear.spec
    values = code_values(linear.codes, spec.scheme.weights.codebook, torch.float64).view(spec.n, -1, spec.group_size)
    base = (values * linear.scale.double().unsqueeze(-1)).view(spec.n, spec.k)
    y = x.double() @ base.T + naive_sidecar(x, linear)
    return y if bias is None else y + bias.double()
