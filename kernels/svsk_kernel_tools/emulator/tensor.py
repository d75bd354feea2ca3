# SPDX-License-Identifier: Apache-2.0
"""Fragments of the matrix instructions: which thread holds which element.

Source: PTX ISA, sections on mma.m16n8k16, ldmatrix, stmatrix and wgmma.

Products of 16-bit floats are exact. Their sums are formed in float64 and rounded once to float32;
the hardware's own order and its truncated intermediate sums are not specified by PTX.
"""

from typing import Any, Final

import numpy as np

from svsk_kernel_tools.emulator.alu import Array
from svsk_kernel_tools.emulator.errors import UnsupportedError
from svsk_kernel_tools.emulator.floats import bf16_to_f64, f16_to_f64

__all__ = [
    "WIDEN",
    "a_matrix",
    "b_matrix",
    "c_matrix",
    "c_registers",
    "descriptor_offsets",
    "from_rows",
    "to_rows",
]

WIDEN: Final[dict[str, Any]] = {"bf16": bf16_to_f64, "f16": f16_to_f64}
"""16-bit patterns to float64."""


def _halves(registers: list[Array], kind: str) -> Array:
    """Values [registers, warps, 8 groups, 4 threads, 2 halves]."""
    bits = np.stack(registers).view(np.uint16)
    values: Array = WIDEN[kind](bits).reshape(len(registers), -1, 8, 4, 2)
    return values


def a_matrix(registers: list[Array], kind: str) -> Array:
    """A [warps, 16, 16] of mma.m16n8k16, and the 16 rows of each warp of wgmma."""
    # half of k, half of rows, warp, group, thread, half
    values = _halves(registers, kind).reshape(2, 2, -1, 8, 4, 2)
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def b_matrix(registers: list[Array], kind: str) -> Array:
    """B [warps, 16, 8] of mma.m16n8k16."""
    values = _halves(registers, kind)  # half of k, warp, column, thread, half
    return values.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)


def c_matrix(registers: list[Array]) -> Array:
    """C [warps, 16, 8 * tiles] in float64; four float32 registers to every 8 columns."""
    values = np.stack(registers).view(np.float32).astype(np.float64)
    # tile, half of rows, half, warp, group, thread
    values = values.reshape(-1, 2, 2, values.shape[1] // 32, 8, 4)
    return values.transpose(3, 1, 4, 0, 5, 2).reshape(values.shape[3], 16, -1)


def c_registers(matrix: Array) -> list[Array]:
    """Inverse of :func:`c_matrix`, rounded to float32."""
    warps, _, columns = matrix.shape
    values = (
        matrix.astype(np.float32)
        .reshape(warps, 2, 8, columns // 8, 4, 2)
        .transpose(3, 1, 5, 0, 2, 4)
    )
    return list(np.ascontiguousarray(values).view(np.uint32).reshape(columns // 2, warps * 32))


def from_rows(rows: Array, transposed: bool) -> list[Array]:
    """Registers of ldmatrix from rows [warps, matrices, 8, 16 bytes]."""
    matrices = np.ascontiguousarray(rows).view(np.uint16)
    if transposed:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    words = matrices.view(np.uint32).reshape(rows.shape[0], rows.shape[1], 32)
    return [np.ascontiguousarray(words[:, index]).ravel() for index in range(rows.shape[1])]


def to_rows(registers: list[Array], transposed: bool) -> Array:
    """Rows [warps, matrices, 8, 16 bytes] of stmatrix from its registers."""
    words = np.stack([register.reshape(-1, 32) for register in registers], axis=1)
    matrices = (
        np.ascontiguousarray(words).view(np.uint16).reshape(words.shape[0], len(registers), 8, 8)
    )
    if transposed:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    return matrices.view(np.uint8)


def descriptor_offsets(descriptor: int, outer: int, inner_is_k: bool) -> Array:
    """Addresses [outer, 16] in the shared window of the first bytes of a wgmma operand's elements.

    Layouts in units of 16 bytes: PTX ISA, "Strides" and "Canonical layouts" of wgmma's
    shared-memory operands. Without transposition (``inner_is_k``) 8 rows of one swizzle width make
    an atom, and atoms follow each other along the outer axis by the stride offset; unswizzled, the
    two halves of k lie the leading offset apart. Transposed, 8 steps of k make an atom, whose outer
    width is that of the swizzle; atoms follow each other along the outer axis by the leading
    offset, along k by the stride offset (unswizzled: the other way round).

    Args:
        descriptor: 64 bits.
        outer: rows of A or columns of B.
        inner_is_k: elements that follow each other in memory follow each other along k.

    Raises:
        ValueError: a field holds what is not supported.
    """
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode, base = descriptor >> 62 & 3, descriptor >> 49 & 7
    supported = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
    if base or descriptor & ~supported:
        raise UnsupportedError(f"descriptor {descriptor:#018x}: a base offset or unknown bits")
    chunks = {0: 1, 1: 8, 2: 4, 3: 2}[mode]  # of 16 bytes, side by side in a row of the swizzle
    m, k = np.arange(outer)[:, None], np.arange(16)[None, :]
    if inner_is_k:
        chunk, byte = k // 8, k % 8 * 2
        place = m % 8 * (16 * chunks) + m // 8 * stride + chunk * (16 if mode else leading) + byte
    else:
        chunk, byte = m // 8, m % 8 * 2
        first, second = (leading, stride) if mode else (stride, leading)
        place = (
            chunk % chunks * 16
            + chunk // chunks * first
            + k % 8 * (16 * chunks)
            + k // 8 * second
            + byte
        )
    address: Array = start + place
    swizzled: Array = address ^ ((address >> 7 & (chunks - 1)) << 4)
    return swizzled
