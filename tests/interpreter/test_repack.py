# SPDX-License-Identifier: Apache-2.0
"""The run-time layout: its definition, written out plainly, and that it is reversible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svsk_kernels.gpu.repack_base import ROW_PAD, pack_base, pack_scale, plane_length
from svsk_kernels.gpu.repack_sidecar import (
    MAX_JOB_COLUMNS,
    V_ROWS,
    Tiles,
    pack_sidecar,
    u_bytes,
)
from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup
from tests.interpreter.layers import make_layer
from tests.support.format_builders import property_test
from tests.support.unpack_gpu import unpack_base, unpack_scale, unpack_sidecar

QKV = (
    {"n": 96, "rank": 8, "tile_m": 48},
    {"n": 40, "rank": 0},
    {"n": 32, "rank": 24, "tile_m": 20, "tile_n": 56},
)


@pytest.mark.parametrize(
    ("k", "plane"),
    [
        (2560, 64),
        (256, 64),
        (576, 16),
        (896, 32),
        (1152, 32),
        (64, 16),
        (32, 16),
        (96, 32),
        (28704, 64),
    ],
)
def test_planes_are_as_long_as_padding_allows(k: int, plane: int) -> None:
    assert plane_length(k) == plane


@property_test
@given(n=st.integers(1, 200), blocks=st.integers(1, 12), seed=st.integers(0, 99))
def test_base_follows_its_definition_and_comes_back(n: int, blocks: int, seed: int) -> None:
    k = 32 * blocks
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(
        -(1 << 31), 1 << 31, (n, k // 8), generator=generator, dtype=torch.int64
    ).to(torch.int32)
    plane = plane_length(k)
    words = pack_base(packed, k, plane)
    assert words.shape[0] % ROW_PAD == 0
    assert words.dtype == torch.int16
    assert torch.equal(unpack_base(words, n, k, plane), packed)
    codes = ((packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).flatten(
        1
    ) - 8
    row = int(torch.randint(0, n, (1,), generator=generator))
    for column in torch.randint(0, k, (16,), generator=generator).tolist():
        block, within = divmod(column, 4 * plane)
        j, p = divmod(within, plane)
        word = int(words[row, block * plane + p]) & 0xFFFF
        assert ((word >> 4 * j) & 15) - 8 == int(codes[row, column])
    scale = torch.randn(n, k // 32, generator=generator).bfloat16()
    stored = pack_scale(scale, plane, 32)
    assert stored.shape[0] * 32 == words.shape[1] * 4
    assert torch.equal(unpack_scale(stored, n, k // 32), scale)
    assert float(stored[:, n:].abs().sum()) == 0


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("k", [64, 160, 1024])
def test_sidecar_comes_back(num_bits: int, k: int) -> None:
    layer = make_layer(k, torch.bfloat16, *QKV, group_size=32, num_bits=num_bits)
    stacked, side = layer.stacked, layer.sidecar
    assert stacked.spec.plan is not None
    assert side is not None
    assert stacked.spec.factor_bits == num_bits
    unpacked = unpack_sidecar(side, stacked.spec.plan, k, num_bits)
    for tensor, expected in zip(unpacked, (stacked.u, stacked.v, stacked.gain), strict=True):
        assert torch.equal(tensor, expected)
    stored = side.u.numel() + side.v.numel() - 1024
    loaded = (stacked.u.numel() + stacked.v.numel()) * num_bits / 8
    assert stored < (1.3 if k == 1024 else 4) * loaded


def test_tables_lead_to_every_factor() -> None:
    """The product through the tables alone, as the module describes them, is the sidecar's."""
    k = 160
    layer = make_layer(k, torch.float16, *QKV, group_size=32)
    side = layer.sidecar
    assert side is not None
    x = torch.randn(3, k, dtype=torch.float64)
    pitch = k
    z = torch.zeros(3, side.gain.numel(), dtype=torch.float64)
    for row, first, stop, tile, own, parts in side.jobs.tolist():
        assert parts == 1
        assert own >= 0
        for i in range(row, row + V_ROWS):
            if side.v_table[0, i] >= 0:
                column = int(side.v_table[0, i] + tile * side.v_table[1, i])
                v = side.v[i * pitch + first : i * pitch + stop].view(torch.int8).double()
                assert side.z_used[column]
                z[:, column] += float(side.gain[column]) * (x[:, first:stop] @ v)
    y = torch.zeros(3, layer.base.n, dtype=torch.float64)
    for n in range(layer.base.n):
        at, start, stop = (int(value) for value in side.row_table[:, n])
        if stop > start:
            y[:, n] = z[:, start:stop] @ side.u[at : at + stop - start].view(torch.int8).double()
    without = make_layer(k, torch.float16, *({**part, "rank": 0} for part in QKV), group_size=32)
    torch.testing.assert_close(y, layer.expected(x) - without.expected(x), rtol=1e-9, atol=1e-9)


def test_long_tiles_are_cut_into_jobs_that_know_each_other() -> None:
    k = 2 * MAX_JOB_COLUMNS + 64
    layer = make_layer(k, torch.float16, {"n": 32, "rank": 20, "tile_m": 0, "tile_n": 0})
    side = layer.sidecar
    assert side is not None
    assert layer.tiles == Tiles(long=True, aligned=True)
    first = [(0, MAX_JOB_COLUMNS), (MAX_JOB_COLUMNS, 2 * MAX_JOB_COLUMNS), (2 * MAX_JOB_COLUMNS, k)]
    wanted = [[row, *cut, 0, own, 3] for row, own in ((0, 0), (16, 3)) for cut in first]
    assert side.jobs.tolist() == wanted


def test_alignment_of_tiles() -> None:
    assert Tiles.of(None) == Tiles(long=False, aligned=True)
    layer = make_layer(160, torch.float16, {"n": 32, "rank": 4, "tile_n": 40}, group_size=32)
    assert layer.tiles == Tiles(long=False, aligned=False)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_size_of_u_is_known_before_it_is_made(num_bits: int) -> None:
    stacked = make_layer(160, torch.float16, *QKV, group_size=32, num_bits=num_bits).stacked
    assert stacked.spec.plan is not None
    side = pack_sidecar(stacked.spec.plan, 160, stacked.u, stacked.v, stacked.gain, num_bits)
    assert u_bytes(stacked.spec.plan, num_bits) == side.u.numel()


def test_factors_that_do_not_fit_and_uneven_tiles_are_refused() -> None:
    stacked = make_layer(64, torch.float16, {"n": 32, "rank": 4}).stacked
    assert stacked.spec.plan is not None
    with pytest.raises(ValueError, match=r"U factors outside \[-8, 7\] do not fit the 4 bits"):
        pack_sidecar(stacked.spec.plan, 64, stacked.u, stacked.v, stacked.gain, 4)
    group = SlotGroup(1, 8, 2, 0)
    plan = SidecarPlan(8, (Bundle((0, 16, 48, 64, 96), (group,)),))
    with pytest.raises(ValueError, match="expected inner tiles of one width"):
        pack_sidecar(plan, 96, *plan.zeros(), 8)
