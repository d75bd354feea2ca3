# SPDX-License-Identifier: Apache-2.0
"""How a weight is cut into the tiles of its sidecar."""

from dataclasses import dataclass

from svsk_kernels.errors import KernelError

__all__ = ["TileGrid", "ceil_div"]


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up, for ``b > 0``."""
    return -(-a // b)


@dataclass(frozen=True)
class TileGrid:
    """Tiles of a weight of ``n`` rows (outputs) and ``k`` columns (inputs).

    Tile (a, b) covers rows ``a * tile_m`` to ``(a + 1) * tile_m`` and columns ``b * tile_n`` to
    ``(b + 1) * tile_n``, cut off at the edges of the weight. A tile size of 0 stands for the whole
    dimension.

    Raises:
        KernelError: a dimension is not positive, or a tile size is negative.
    """

    n: int
    k: int
    tile_m: int
    tile_n: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise KernelError(
                f"A weight of shape [{self.n}, {self.k}] has no tiles: both sizes must be positive."
            )
        if self.tile_m < 0 or self.tile_n < 0:
            raise KernelError(
                f"Tile size {self.tile_m} x {self.tile_n}: expected integers >= 0 (0 = the whole"
                " dimension)."
            )

    @property
    def tile_rows(self) -> int:
        """Rows of a whole tile."""
        return self.tile_m or self.n

    @property
    def tile_cols(self) -> int:
        """Columns of a whole tile."""
        return self.tile_n or self.k

    @property
    def num_row_tiles(self) -> int:
        """``A = ceil(n / tile_m)``."""
        return ceil_div(self.n, self.tile_rows)

    @property
    def num_col_tiles(self) -> int:
        """``B = ceil(k / tile_n)``."""
        return ceil_div(self.k, self.tile_cols)

    def row_slice(self, a: int) -> slice:
        """Rows of the tiles of row ``a`` of the grid."""
        return slice(a * self.tile_rows, min((a + 1) * self.tile_rows, self.n))

    def col_slice(self, b: int) -> slice:
        """Columns of the tiles of column ``b`` of the grid."""
        return slice(b * self.tile_cols, min((b + 1) * self.tile_cols, self.k))
