# SPDX-License-Identifier: Apache-2.0
"""The plan's views lie where the module says: offsets are counted by hand here, and only here."""

import torch

from svsk_kernels.sidecar_plan import Bundle, SidecarPlan, SlotGroup, append_slot

# Two column tiles of 5 and 3, slots of 2, 2 and 1 rows with ranks 2, 2 and 3; then one tile of 8.
FIRST = Bundle((0, 5, 8), (SlotGroup(2, 2, 2, 0), SlotGroup(1, 1, 3, 6)))
SECOND = Bundle((0, 8), (SlotGroup(1, 2, 1, 4),))
PLAN = SidecarPlan(7, (FIRST, SECOND))


def test_slots_in_the_order_of_the_tensors() -> None:
    assert [(slot.bundle, slot.rows, slot.ranks) for slot in PLAN.slots] == [
        (0, slice(0, 2), slice(0, 2)),
        (0, slice(2, 4), slice(2, 4)),
        (0, slice(6, 7), slice(4, 7)),
        (1, slice(4, 6), slice(0, 1)),
    ]
    assert PLAN.covers_all_rows
    assert not SidecarPlan(8, PLAN.bundles).covers_all_rows


def test_views_lie_where_the_layout_says() -> None:
    sizes = [flat.numel() for flat in PLAN.zeros()]
    assert sizes == [2 * 2 * 4 + 6 + 2, 2 * 7 * 5 + 8, 2 * 7 + 1]
    u, v, gain = (torch.arange(size) for size in sizes)
    u_slots, v_slots, gain_slots = PLAN.u_slots(u), PLAN.v_slots(v), PLAN.gain_slots(gain)
    # element [row, tile, rank], [tile, rank, column] and [tile, rank] of each slot
    starts = [(0, 0, 0), (8, 2 * 5, 2), (16, 4 * 5, 4), (22, 70, 14)]
    for index, (u_start, v_start, gain_start) in enumerate(starts):
        slot = PLAN.slots[index]
        bundle = PLAN.bundles[slot.bundle]
        tiles, rank, width = bundle.num_col_tiles, slot.rank, bundle.width
        rows = slot.rows.stop - slot.rows.start
        expected_u = u_start + torch.arange(rows * tiles * rank).view(rows, tiles, rank)
        by_tile = torch.arange(tiles).view(-1, 1) * bundle.total_rank + torch.arange(rank)
        expected_v = v_start + by_tile.unsqueeze(-1) * width + torch.arange(width)
        assert torch.equal(u_slots[index], expected_u)
        assert torch.equal(v_slots[index], expected_v)
        assert torch.equal(gain_slots[index], gain_start + by_tile)
    assert [group.shape for group in PLAN.u_bundles(u)[0]] == [(2, 2, 2, 2), (1, 1, 2, 3)]
    assert [view.shape for view in PLAN.v_bundles(v)] == [(2, 7, 5), (1, 1, 8)]


def test_views_write_into_the_flat_tensors() -> None:
    u, v, gain = PLAN.zeros()
    for views in (PLAN.u_slots(u), PLAN.v_slots(v), PLAN.gain_slots(gain)):
        for view in views:
            view.fill_(1)
    assert all(bool((flat == 1).all()) for flat in (u, v, gain))


def test_column_tiles_leave_out_the_padding() -> None:
    view = torch.arange(2 * 5).view(2, 1, 5)
    tiles = list(FIRST.column_tiles(view))
    assert [columns for columns, _ in tiles] == [slice(0, 5), slice(5, 8)]
    assert torch.equal(tiles[1][1], view[1, :, :3])


def test_slots_that_go_on_join_a_group() -> None:
    groups: list[SlotGroup] = []
    for rows, rank, row in [(4, 2, 0), (4, 2, 4), (4, 3, 8), (2, 3, 12), (2, 3, 20)]:
        append_slot(groups, rows, rank, row)
    assert groups == [
        SlotGroup(2, 4, 2, 0),
        SlotGroup(1, 4, 3, 8),
        SlotGroup(1, 2, 3, 12),
        SlotGroup(1, 2, 3, 20),
    ]
