# SPDX-License-Identifier: Apache-2.0
"""Operations that go on beside the threads that began them: ``cp.async`` and ``wgmma``.

Between its issue and its wait such an operation may take place at any time; the emulator does it at
one end or the other (``late``) and takes any access in between that would tell the difference for
an error.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from svsk_kernel_tools.emulator.alu import Array
from svsk_kernel_tools.emulator.errors import BarrierError, RaceError
from svsk_kernel_tools.emulator.parse import SHARED_BASE
from svsk_kernel_tools.emulator.tensor import (
    WIDEN,
    a_matrix,
    c_matrix,
    c_registers,
    descriptor_offsets,
)

__all__ = ["BUSY", "Copies", "Product", "Products"]


class _Busy:
    """Stands in a register that a ``wgmma`` is still to write; every use fails."""

    __array_ufunc__ = None

    def __array__(self, *_: Any) -> Array:
        raise RaceError("it uses a register that a wgmma writes which was not waited for")


BUSY: Final = _Busy()
"""What such registers hold."""


@dataclass
class _Copy:
    """One ``cp.async`` of some threads; what has not landed of it."""

    threads: Array
    rows: Array
    address: Array
    sizes: Array  # bytes read of each thread's; zeros follow
    values: Array | None
    total: int
    groups: Array


class Copies:
    """The copies of one block in flight."""

    def __init__(self, cta: Any, late: bool) -> None:
        self._cta, self._late = cta, late
        self._flying: list[_Copy] = []
        self._committed = np.zeros(cta.threads, np.int64)

    def begin(self, target: Array, source: Array, total: int, sizes: Array, threads: Array) -> None:
        """Issue copies of ``total`` bytes, of which ``sizes`` are read."""
        rows = self._cta.shared.begin_copy(target, total, threads)
        copy = _Copy(threads, rows, source, sizes, None, total, self._committed[threads])
        copy.values = None if self._late else self._read(copy)
        if copy.values is not None:
            self._cta.shared.put_copy(rows, copy.values)
        self._flying.append(copy)

    def commit(self, threads: Array) -> None:
        """End the current group of these threads."""
        self._committed[threads] += 1

    def wait(self, threads: Array, pending: int | None) -> None:
        """Land what these threads issued but for the latest ``pending`` groups.

        None: everything.
        """
        chosen = np.zeros(self._cta.threads, np.bool_)
        chosen[threads] = True
        limit = self._committed - pending if pending is not None else self._committed + 1
        still = []
        for copy in self._flying:
            done = chosen[copy.threads] & (copy.groups < limit[copy.threads])
            if done.all():
                self._land(copy)
                self._cta.shared.copies_done()
            elif done.any():
                self._land(_part(copy, done))
                still.append(_part(copy, ~done))
            else:
                still.append(copy)
        self._flying = still

    def _read(self, copy: _Copy) -> Array:
        values = np.zeros((len(copy.threads), copy.total), np.uint8)
        for size in np.unique(copy.sizes[copy.sizes > 0]):
            sized = copy.sizes == size
            width = int(size)
            piece = copy.total if width == copy.total else 1
            for offset in range(0, width, piece):
                place = copy.address[sized] + np.uint64(offset)
                values[sized, offset : offset + piece] = self._cta.memory.load(
                    place, piece, copy.threads[sized]
                )
        return values

    def _land(self, copy: _Copy) -> None:
        if copy.values is None:
            self._cta.shared.put_copy(copy.rows, self._read(copy))
        self._cta.shared.end_copy(copy.rows, copy.total, copy.threads)


def _part(copy: _Copy, some: Array) -> _Copy:
    values = None if copy.values is None else copy.values[some]
    return _Copy(
        copy.threads[some],
        copy.rows[some],
        copy.address[some],
        copy.sizes[some],
        values,
        copy.total,
        copy.groups[some],
    )


@dataclass(frozen=True)
class Product:
    """One ``wgmma.mma_async``: numbers of its registers and its constants."""

    columns: int
    kind: str
    accumulator: tuple[int, ...]
    a_registers: tuple[int, ...]  # empty where A is in shared memory
    a_descriptor: int  # register
    b_descriptor: int
    scale_d: int  # register
    signs: tuple[int, int]
    transposed: tuple[bool, bool]


@dataclass
class _Pending:
    product: Product
    keep: bool
    a_values: list[Array]
    a_offsets: Array | None
    b_offsets: Array  # [warp groups, 16 * columns]
    group: int
    a_matrix: Array | None = None
    b_matrix: Array | None = None


class Products:
    """The ``wgmma`` of one block. All its warps have to be at each of them."""

    def __init__(self, cta: Any, late: bool) -> None:
        self._cta, self._late = cta, late
        self._pending: list[_Pending] = []
        self._values: dict[int, Array] = {}  # accumulators that are not to be touched yet
        self._group = 0
        self._fenced: list[Any] = []

    def fence(self) -> None:
        """Registers as they are now may be used by products."""
        self._fenced = list(self._cta.r)

    def begin(self, product: Product) -> None:
        """Issue one."""
        r = self._cta.r
        for register in (*product.a_registers, *product.accumulator):
            if register not in self._values and (
                not self._fenced or r[register] is not self._fenced[register]
            ):
                name = self._cta.code.slots.names[register]
                raise RaceError(f"register {name} was written after the last wgmma.fence")
        keep = r[product.scale_d]
        if keep.any() != keep.all():
            raise BarrierError("scale-d is not the same for all threads")
        operand = self._offsets(r[product.b_descriptor], product.columns, not product.transposed[1])
        left = (
            None
            if product.a_registers
            else self._offsets(r[product.a_descriptor], 64, not product.transposed[0])
        )
        a_values = [r[register] for register in product.a_registers]
        pending = _Pending(product, bool(keep.all()), a_values, left, operand, self._group)
        self._claim(pending, self._cta.shared.begin_matrix)
        for register in product.accumulator:
            if register not in self._values:
                self._values[register] = r[register]
                r[register] = BUSY
        if not self._late:
            self._fetch(pending)
        self._pending.append(pending)

    def commit(self) -> None:
        """End the current group."""
        self._group += 1

    def wait(self, pending: int) -> None:
        """Finish all but the latest ``pending`` groups."""
        r = self._cta.r
        while self._pending and self._pending[0].group < self._group - pending:
            matrix = self._pending.pop(0)
            for register, value in zip(matrix.product.a_registers, matrix.a_values, strict=True):
                if r[register] is not value:
                    name = self._cta.code.slots.names[register]
                    raise RaceError(
                        f"register {name} was written while a wgmma might still read it"
                    )
            if self._late:
                self._fetch(matrix)
            self._finish(matrix)
            self._claim(matrix, lambda offsets, _: self._cta.shared.end_matrix(offsets))
        busy = {register for matrix in self._pending for register in matrix.product.accumulator}
        for register in [register for register in self._values if register not in busy]:
            if r[register] is not BUSY:
                raise RaceError(
                    f"register {self._cta.code.slots.names[register]} was written while a wgmma"
                    " writes it"
                )
            r[register] = self._values.pop(register)

    def _claim(self, one: _Pending, function: Any) -> None:
        """Call with the bytes that each warp group reads, and its threads."""
        for operand in (one.a_offsets, one.b_offsets):
            for index, offsets in enumerate(() if operand is None else operand):
                both = np.unique(np.concatenate([offsets.ravel(), offsets.ravel() + 1]))
                function(both, np.arange(index * 128, index * 128 + 128))

    def _offsets(self, descriptors: Array, outer: int, inner_is_k: bool) -> Array:
        groups = descriptors.reshape(-1, 128)
        if (groups != groups[:, :1]).any():
            raise BarrierError(
                "the matrix descriptor is not the same for all threads of a warp group"
            )
        return np.stack(
            [descriptor_offsets(int(one), outer, inner_is_k) - SHARED_BASE for one in groups[:, 0]]
        )

    def _fetch(self, one: _Pending) -> None:
        """Read the operands from shared memory."""
        product = one.product
        one.b_matrix = self._matrix(one.b_offsets, product.kind)
        if one.a_offsets is not None:
            one.a_matrix = self._matrix(one.a_offsets, product.kind)
        else:
            one.a_matrix = a_matrix(one.a_values, product.kind).reshape(len(one.b_offsets), 64, 16)

    def _matrix(self, offsets: Array, kind: str) -> Array:
        bits = self._cta.shared.data.view(np.uint16)[offsets // 2]
        matrix: Array = WIDEN[kind](bits.ravel()).reshape(offsets.shape)
        return matrix

    def _finish(self, one: _Pending) -> None:
        product = one.product
        assert one.a_matrix is not None
        assert one.b_matrix is not None
        result = one.a_matrix @ one.b_matrix.swapaxes(1, 2) * (product.signs[0] * product.signs[1])
        result = result.reshape(-1, 16, product.columns)
        if one.keep:
            result = result + c_matrix([self._values[register] for register in product.accumulator])
        for register, value in zip(product.accumulator, c_registers(result), strict=True):
            self._values[register] = value
