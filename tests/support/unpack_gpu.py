# SPDX-License-Identifier: Apache-2.0
"""From the tensors that GPU kernels read back to those of a checkpoint or a loaded layer."""

import torch

from svsk_kernels.gpu import repack_sidecar as repack
from svsk_kernels.sidecar_plan import SidecarPlan


def unpack_base(words: torch.Tensor, n: int, k: int, plane: int) -> torch.Tensor:
    """Inverse of :func:`pack_base`: int32 [``n``, ``k`` / 8] in the checkpoint's order."""
    wide = words[:n].to(torch.int32).view(n, -1, 1, plane)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device).view(1, 1, 4, 1)
    codes = ((wide >> shifts) & 15).reshape(n, -1)[:, :k].reshape(n, -1, 8).to(torch.int64)
    packed = (codes << torch.arange(0, 32, 4, device=words.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_scale(stored: torch.Tensor, n: int, groups: int) -> torch.Tensor:
    """Inverse of :func:`pack_scale`: [``n``, ``groups``]."""
    return stored[:groups, :n].T.contiguous()


def unpack_scale_codes(
    stored: torch.Tensor, n: int, k: int, plane: int, group_size: int
) -> torch.Tensor:
    """Inverse of :func:`pack_scale_codes`: int8 [``n``, ``k / group_size``]."""
    runs, num_bytes = max(1, plane // group_size), stored.itemsize
    biased = stored.view(torch.uint8).view(-1, runs, stored.shape[1], num_bytes)
    groups = biased.permute(0, 3, 1, 2).flatten(0, 2)[: k // group_size, :n].T
    return (groups.to(torch.int16) - 128).to(torch.int8).contiguous()


def unpack_sidecar(
    packed: repack.PlanarSidecar, plan: SidecarPlan, k: int, num_bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse of :func:`pack_sidecar`: ``u``, ``v`` and ``gain``, flat, in the plan's order."""
    starts, pitch = repack._v_rows(plan), repack.v_pitch(k, num_bits)
    u, v, gain = plan.zeros(packed.u.device)
    v_rows = _read(packed.v[: starts[-1] * pitch].view(starts[-1], pitch), num_bits, repack._V_HALF)
    for start, bundle, part in zip(starts, plan.bundles, plan.v_bundles(v), strict=False):
        for columns, tile in bundle.column_tiles(part):
            tile.copy_(v_rows[start : start + bundle.total_rank, columns])
    u_views, gain_views, u_start = plan.u_slots(u), plan.gain_slots(gain), 0
    for place in repack._place(plan, num_bits):
        view, z = u_views[place.index], place.z
        row_bytes = (place.z_stop - place.z_start) * num_bits // 8
        u_stop = u_start + len(view) * row_bytes
        values = _read(packed.u[u_start:u_stop].view(-1, row_bytes), num_bits, repack._U_HALF)
        view.copy_(values[:, : z.stop - z.start].view(view.shape))
        gain_views[place.index].copy_(packed.gain[z].view(place.tiles, -1))
        u_start = u_stop
    return u, v, gain


def _read(stored: torch.Tensor, num_bits: int, half: int) -> torch.Tensor:
    return _from_halves(stored, half) if num_bits == 4 else stored.view(torch.int8)


def _from_halves(stored: torch.Tensor, half: int) -> torch.Tensor:
    """Inverse of :func:`svsk_kernels.gpu.repack_sidecar._halves`."""
    pairs = stored.unflatten(-1, (-1, half))
    return (torch.stack((pairs & 15, pairs >> 4), dim=-2).to(torch.int8) - 8).flatten(-3)
