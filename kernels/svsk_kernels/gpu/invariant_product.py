# SPDX-License-Identifier: Apache-2.0
"""The product whose rows have the same bits whatever rows are beside them.

One compiled kernel, in the same blocks and with its columns split the same way, takes any number of
tokens, and so does the one that computes z. A program's sums go through the columns in order, and
partial sums are added in the order of the splits: nothing that enters a row's sums depends on other
rows, or on how many there are.
"""

from typing import Final

import torch

from svsk_kernels.gpu.choice import Choice
from svsk_kernels.gpu.launch import PackedProduct
from svsk_kernels.gpu.repack_base import Base
from svsk_kernels.gpu.repack_sidecar import PlanarSidecar, Tiles

__all__ = ["InvariantProduct"]

_SLICE: Final = 1024
"""Tokens whose partial sums lie in memory at a time, where columns are split."""


class InvariantProduct:
    """``x W_hat^T + bias``, prepared for layers like one.

    Args:
        base: of the layer; what counts are its sizes.
        sidecar: likewise; None for none.
        num_bits: of the factors as packed.
        choice: kernel and blocks for any number of tokens; not ``fold``.
        tiles: what all column tiles have in common.
        dtype: of the activations, bfloat16 or float16.
        has_bias: whether there is a bias.
    """

    def __init__(
        self,
        base: Base,
        sidecar: PlanarSidecar | None,
        num_bits: int,
        choice: Choice,
        tiles: Tiles,
        *,
        dtype: torch.dtype,
        has_bias: bool,
    ) -> None:
        self._product = PackedProduct(
            base,
            sidecar,
            num_bits,
            choice,
            tiles,
            dtype=dtype,
            has_bias=has_bias,
            shrink_block=32 if tiles.aligned else 16,
        )
        self._n, self._split = base.n, choice.split_k > 1

    def __call__(
        self,
        x: torch.Tensor,
        base: Base,
        sidecar: PlanarSidecar | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """As :meth:`svsk_kernels.gpu.launch.PackedProduct.__call__`."""
        m = x.shape[0]
        if m <= _SLICE or not self._split:
            return self._product(x, base, sidecar, bias)
        y = x.new_empty(m, self._n)
        for start in range(0, m, _SLICE):
            rows = slice(start, start + _SLICE)
            self._product(x[rows], base, sidecar, bias, y[rows])
        return y
