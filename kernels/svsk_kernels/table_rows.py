# SPDX-License-Identifier: Apache-2.0
"""Rows of an embedding table that is stored as a layer is.

Kernels keep codes and scales in layouts of their own and give back the rows of those they are asked
for. Of a sidecar a row needs all of V, so the factors of a table are kept once more as they were
loaded: for N rows of rank r, N r bytes beside the N K / 2 of the codes.
"""

from itertools import pairwise
from typing import Any, Final

import torch

from svsk_kernels.codebook import Codebook, code_values
from svsk_kernels.errors import KernelError
from svsk_kernels.layer_kernel import LayerSpec, replace_parameters

__all__ = ["TableRows"]

_FACTORS: Final = ("lookup_u", "lookup_v", "lookup_gain")


class TableRows:
    """Makes rows of ``W_hat`` of one layer; plain attributes, for compilers to look through.

    Args:
        spec: of the layer. Without ``lookup`` nothing is kept of its sidecar.
        codebook: of the codes that are given, if not the layer's.
    """

    def __init__(self, spec: LayerSpec, codebook: Codebook | None = None) -> None:
        self.codebook = codebook or spec.codebook
        self.dtype = spec.dtype
        self.plan = spec.plan if spec.lookup else None
        self.last = 0  # row that has a sidecar
        self.tiles: list[tuple[int, int]] = []  # first and end column
        if self.plan is not None:
            slot = self.plan.slots[0]
            self.last = slot.rows.stop - 1
            self.tiles = list(pairwise(self.plan.bundles[slot.bundle].bounds))

    def keep(self, layer: Any) -> None:
        """Register what lookups need of the sidecar, before a kernel rearranges it.

        Raises:
            KernelError: the rows are cut into tiles.
        """
        if self.plan is None:
            return
        if len(self.plan.slots) != 1:
            raise KernelError(
                "The sidecar of an embedding table has tiles of rows. Quantise it with tile_m 0, as"
                " `svsk quantize` does."
            )
        factors = (
            self.plan.u_slots(layer.sidecar_u.data)[0],
            self.plan.v_slots(layer.sidecar_v.data)[0],
            self.plan.gain_slots(layer.sidecar_gain.data)[0],
        )
        kept = [tensor.clone() for tensor in factors]
        replace_parameters(layer, dict(zip(_FACTORS, kept, strict=True)))

    def __call__(
        self, layer: Any, ids: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Rows from their codes and scales, rounded once to the layer's dtype.

        Args:
            layer: with what :meth:`keep` registered.
            ids: int64 [M], the rows.
            codes: integers [M, K] of those rows.
            scale: floating [M, K / g] of those rows.

        Returns:
            [M, K].
        """
        levels = code_values(codes, self.codebook)
        grouped: torch.Tensor = levels.unflatten(1, (scale.shape[1], -1))
        weight = (grouped * scale.float().unsqueeze(-1)).flatten(1)
        if self.tiles:
            # Rows beyond the last pad the vocabulary: nobody asks for them.
            u = layer.lookup_u[ids.clamp(max=self.last)].float() * layer.lookup_gain
            parts = [
                u[:, b] @ layer.lookup_v[b, :, : stop - start].float()
                for b, (start, stop) in enumerate(self.tiles)
            ]
            weight = weight + torch.cat(parts, dim=1)
        return weight.to(self.dtype)
