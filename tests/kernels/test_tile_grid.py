# SPDX-License-Identifier: Apache-2.0
"""Tiles of a sidecar: they partition the weight, ragged edges included."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsk_vllm.format import TileGrid, ceil_div
from tests.support.format_builders import property_test

sizes = st.integers(1, 40)
tile_sizes = st.integers(0, 50)  # 0: the whole dimension; up to larger than any weight drawn


@property_test
@given(sizes, sizes, tile_sizes, tile_sizes)
def test_every_element_is_in_exactly_one_tile(n: int, k: int, tile_m: int, tile_n: int) -> None:
    grid = TileGrid(n, k, tile_m, tile_n)
    covered = np.zeros((n, k), int)
    tile_of = np.full((n, k, 2), -1)
    for a in range(grid.num_row_tiles):
        for b in range(grid.num_col_tiles):
            block = covered[grid.row_slice(a), grid.col_slice(b)]
            assert block.size > 0
            block += 1
            tile_of[grid.row_slice(a), grid.col_slice(b)] = a, b
    assert (covered == 1).all()
    rows, cols = np.indices((n, k))
    assert np.array_equal(tile_of[..., 0], rows // (tile_m or n))
    assert np.array_equal(tile_of[..., 1], cols // (tile_n or k))


@property_test
@given(sizes, sizes, tile_sizes, tile_sizes)
def test_slices_stay_inside_and_only_the_last_is_ragged(
    n: int, k: int, tile_m: int, tile_n: int
) -> None:
    grid = TileGrid(n, k, tile_m, tile_n)
    rows = [grid.row_slice(a) for a in range(grid.num_row_tiles)]
    cols = [grid.col_slice(b) for b in range(grid.num_col_tiles)]
    assert [s.stop - s.start for s in rows[:-1]] == [grid.tile_rows] * (len(rows) - 1)
    assert [s.stop - s.start for s in cols[:-1]] == [grid.tile_cols] * (len(cols) - 1)
    assert (rows[-1].stop, cols[-1].stop) == (n, k)


@pytest.mark.parametrize(
    ("shape", "tiles", "grid_shape", "last"),
    [
        (
            (1000, 2560),
            (512, 1024),
            (2, 3),
            (slice(512, 1000), slice(2048, 2560)),
        ),  # the example of docs/format.md
        ((1024, 2048), (512, 1024), (2, 2), (slice(512, 1024), slice(1024, 2048))),
        ((1000, 2560), (0, 0), (1, 1), (slice(0, 1000), slice(0, 2560))),
        ((1000, 2560), (4096, 4096), (1, 1), (slice(0, 1000), slice(0, 2560))),
        ((513, 64), (512, 0), (2, 1), (slice(512, 513), slice(0, 64))),
    ],
)
def test_examples(
    shape: tuple[int, int],
    tiles: tuple[int, int],
    grid_shape: tuple[int, int],
    last: tuple[slice, slice],
) -> None:
    grid = TileGrid(*shape, *tiles)
    a, b = grid.num_row_tiles, grid.num_col_tiles
    assert (a, b) == grid_shape
    assert (grid.row_slice(a - 1), grid.col_slice(b - 1)) == last


@property_test
@given(st.integers(0, 10**15), st.integers(1, 10**6))
def test_ceil_div_is_exact(a: int, b: int) -> None:
    quotient = ceil_div(a, b)
    assert (quotient - 1) * b < a <= quotient * b


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 64, 16, 16), r"\[0, 64\] has no tiles"),
        ((64, 0, 16, 16), r"\[64, 0\] has no tiles"),
        ((64, -1, 16, 16), r"\[64, -1\] has no tiles"),
        ((64, 64, -1, 16), r"Tile size -1 x 16: expected integers >= 0 \(0 = the whole dimension"),
        ((64, 64, 16, -2), "Tile size 16 x -2"),
    ],
)
def test_refuses(args: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileGrid(*args)
