# SPDX-License-Identifier: Apache-2.0
"""Layers as a kernel gets them, built straight from the definition in ``svsk_kernels.sidecar_plan``."""

import itertools

import torch

from svsk_kernels import Bundle, LayerSpec, SidecarPlan, SlotGroup, replace_parameters
from svsk_vllm.format import QuantizedLinear, pack_codes


def loaded_sidecar(
    linear: QuantizedLinear,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SidecarPlan]:
    """Loaded U, V and gain of a whole, unfused layer, and its plan."""
    assert linear.u is not None
    assert linear.v is not None
    assert linear.gain is not None
    grid, rank = linear.spec.grid, linear.spec.rank
    bounds = (*range(0, grid.k, grid.tile_cols), grid.k)
    whole, rest = divmod(grid.n, grid.tile_rows)
    groups = [SlotGroup(whole, grid.tile_rows, rank, 0)] if whole else []
    if rest:
        groups.append(SlotGroup(1, rest, rank, whole * grid.tile_rows))
    bundle = Bundle(bounds, tuple(groups))
    v = torch.zeros(bundle.v_shape, dtype=torch.int8)
    gain = torch.zeros(bundle.gain_shape)
    for a, b in itertools.product(range(grid.num_row_tiles), range(grid.num_col_tiles)):
        cols = grid.col_slice(b)
        ranks = slice(a * rank, (a + 1) * rank)
        v[b, ranks, : cols.stop - cols.start] = linear.v[a, :, cols]
        gain[b, ranks] = linear.gain[a, b]
    return linear.u.flatten(), v.flatten(), gain.flatten(), SidecarPlan(grid.n, (bundle,))


def loaded_layer(linear: QuantizedLinear, dtype: torch.dtype) -> tuple[LayerSpec, torch.nn.Module]:
    """A layer after loading, before a kernel has prepared it."""
    spec = linear.spec
    layer = torch.nn.Module()
    replace_parameters(
        layer, {"weight_packed": pack_codes(linear.codes), "weight_scale": linear.scale.to(dtype)}
    )
    plan = None
    if spec.rank:
        u, v, gain, plan = loaded_sidecar(linear)
        replace_parameters(layer, {"sidecar_u": u, "sidecar_v": v, "sidecar_gain": gain})
    weights = spec.scheme.weights
    return LayerSpec(spec.n, spec.k, weights.group_size, weights.codebook, dtype, plan), layer
