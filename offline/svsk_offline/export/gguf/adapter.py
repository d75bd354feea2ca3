# SPDX-License-Identifier: Apache-2.0
"""Sidecars as a LoRA adapter in GGUF.

llama.cpp (src/llama-adapter.cpp) reads ``NAME.lora_a`` [r, K] and ``NAME.lora_b`` [N, r] for each
weight, any rank, and adds ``B A`` times alpha / r, or times 1 where alpha is 0.
"""

from typing import Final

import torch

from svsk_kernels.errors import SvskError
from svsk_vllm.format import LinearSpec, QuantizedLinear

__all__ = ["adapter_rank", "lora_factors", "require_small"]

_LARGEST_SHARE: Final = 8
"""An adapter of more than min(N, K) / 8 ranks is larger than its 4-bit base: r (N + K) 16 bits
against N K 4.5 bits, of a square matrix."""


def adapter_rank(spec: LinearSpec) -> int:
    """Rank of the adapter: every tile needs ranks of its own."""
    return spec.grid.num_row_tiles * spec.grid.num_col_tiles * spec.rank


def require_small(spec: LinearSpec) -> None:
    """Refuse a sidecar whose tiles would make a huge adapter.

    Raises:
        SvskError: they would.
    """
    rank, limit = adapter_rank(spec), min(spec.n, spec.k) // _LARGEST_SHARE
    if rank > spec.rank and rank > limit:
        raise SvskError(
            f"--lora: {spec.name}: {spec.grid.num_row_tiles} x {spec.grid.num_col_tiles} tiles of"
            f" rank {spec.rank} make an adapter of rank {rank}, more than {limit}. Quantise with"
            " `--tile-m 0 --tile-n 0`, or leave --lora out and lose the sidecar."
        )


def lora_factors(linear: QuantizedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors of a linear's sidecar, zero outside each rank's tile.

    The square root of a gain goes to either side, which keeps both in float16's range.

    Args:
        linear: with a sidecar, A x B tiles.

    Returns:
        float16 [A * B * r, K] and [N, A * B * r].

    Raises:
        SvskError: a factor exceeds float16's range.
    """
    spec, grid = linear.spec, linear.spec.grid
    assert linear.u is not None
    assert linear.v is not None
    assert linear.gain is not None
    rank = adapter_rank(spec)
    a, b = torch.zeros(rank, spec.k), torch.zeros(spec.n, rank)
    at = 0
    for i in range(grid.num_row_tiles):
        for j in range(grid.num_col_tiles):
            part, rows, cols = slice(at, at + spec.rank), grid.row_slice(i), grid.col_slice(j)
            root = linear.gain[i, j].abs().sqrt()
            a[part, cols] = linear.v[i, :, cols].float() * root[:, None]
            b[rows, part] = linear.u[rows, j].float() * (root * linear.gain[i, j].sign())
            at += spec.rank
    factors = a.half(), b.half()
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise SvskError(
            f"--lora: {spec.name}: a factor of its sidecar exceeds float16's range. Leave --lora"
            " out, or export with `--to dense`."
        )
    return factors
