# SPDX-License-Identifier: Apache-2.0
"""What is timed.

Layers of two models, numbers of tokens, kinds of sidecar; and the bytes each of them needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernels.codebook import Codebook
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "GROUP_SIZE",
    "SHAPES",
    "TILE_M",
    "TILE_N",
    "TOKENS",
    "VARIANTS",
    "Shape",
    "Variant",
    "by_name",
    "bytes_dense",
    "bytes_needed",
    "find_shapes",
]

Named = TypeVar("Named")

GROUP_SIZE: Final = 64
TILE_M: Final = 512
TILE_N: Final = 1024


@dataclass(frozen=True)
class Shape:
    """A linear, N x K."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Variant:
    """How a linear is quantised."""

    codebook: Codebook
    rank: int
    bits: Literal[4, 8]  # of the factors; without meaning at rank 0

    @property
    def label(self) -> str:
        """Short name, like ``int4-r16-8bit``."""
        return f"{self.codebook}-r{self.rank}" + (f"-{self.bits}bit" if self.rank else "")


SHAPES: Final = (
    Shape("qwen3-4b.qkv", 6144, 2560),
    Shape("qwen3-4b.o", 2560, 4096),
    Shape("qwen3-4b.gate_up", 19456, 2560),
    Shape("qwen3-4b.down", 2560, 9728),
    Shape("llama-70b-tp8.qkv", 1280, 8192),
    Shape("llama-70b-tp8.o", 8192, 1024),
    Shape("llama-70b-tp8.gate_up", 7168, 8192),
    Shape("llama-70b-tp8.down", 8192, 3584),
)

TOKENS: Final = (1, 4, 16, 64, 128, 512, 2048, 8192)

VARIANTS: Final = (
    Variant("int4", 16, 8),
    Variant("int4", 0, 8),
    Variant("int4", 32, 4),
    Variant("quad8", 16, 8),
)


def find_shapes(names: list[str] | None) -> list[Shape]:
    """Shapes by name, all without names.

    Raises:
        BenchError: there is no such shape.
    """
    return by_name("--shape", {shape.name: shape for shape in SHAPES}, names or (), ", ")


def by_name(
    option: str, known: Mapping[str, Named], names: Sequence[str], separator: str
) -> list[Named]:
    """What an option names, all without names; ``separator`` is for the names in an error.

    Raises:
        BenchError: a name is not known.
    """
    for name in names:
        if name not in known:
            raise BenchError(f"{option} {name}: expected one of {separator.join(known)}.")
    return [known[name] for name in names or known]


def bytes_needed(shape: Shape, variant: Variant, m: int) -> int:
    """Bytes a product of ``m`` tokens must read or write once.

    Codes, scales, sidecar, activations, outputs.
    """
    n, k, rank = shape.n, shape.k, variant.rank
    row_tiles, col_tiles = ceil_div(n, TILE_M), ceil_div(k, TILE_N)
    base = n * k // 2 + n * (k // GROUP_SIZE) * 2
    factors = (n * col_tiles * rank + row_tiles * rank * k) * variant.bits // 8
    gains = row_tiles * col_tiles * rank * 4
    return base + factors + gains + _activations(shape, m)


def bytes_dense(shape: Shape, m: int) -> int:
    """The same for a 16-bit weight."""
    return shape.n * shape.k * 2 + _activations(shape, m)


def _activations(shape: Shape, m: int) -> int:
    return m * (shape.k + shape.n) * 2
