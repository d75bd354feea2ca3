# SPDX-License-Identifier: Apache-2.0
"""One kernel with its blocks, and what a choice among them needs to know of a GPU."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from svsk_kernels.errors import KernelError
from svsk_kernels.gpu.repack_base import plane_length

__all__ = ["GROUP_SIZES", "Choice", "Gpu", "TuningError", "choice_for", "longest_step"]

GROUP_SIZES: Final = (16, 32, 64)
"""Weights per scale that the kernels take."""


class TuningError(KernelError):
    """A table of configurations cannot be used. The message names the file and the entry."""


_ALLOWED: Final = {
    "kernel": ("decode", "gemm", "fold"),
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "step": (16, 32, 64),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "split_k": tuple(range(1, 65)),
    "pdl": (False, True),
    "join": (False, True),
}
"""Values of a choice's fields that the kernels can be compiled for."""


@dataclass(frozen=True)
class Choice:
    """One kernel with its blocks, for up to ``max_m`` tokens.

    Raises:
        TuningError: a value that the kernels cannot be compiled for.
    """

    kernel: Literal["decode", "gemm", "fold"]
    max_m: int | None = None  # None: any number
    block_m: int = 16  # tokens of a program
    block_n: int = 64  # rows of a program
    step: int = 64  # words of a row per turn of the main loop
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1  # parts of the columns (decode only)
    pdl: bool = False  # start beside the kernel that computes z, where the GPU can (decode only)
    join: bool = False  # all planes in one product, for tensor cores that work beside the program

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed or type(value) is not type(allowed[0]):
                raise TuningError(
                    f"{name} {value!r}: kernels are compiled for"
                    f" {', '.join(map(repr, allowed))} only"
                )
        if self.max_m is not None and (type(self.max_m) is not int or self.max_m < 1):
            raise TuningError(f"max_m {self.max_m!r}: expected a number of tokens, or null for any")
        if self.split_k > 1 and self.kernel != "decode":
            raise TuningError(
                f"split_k {self.split_k} with kernel {self.kernel}: only decode splits the columns"
            )
        if self.join and self.kernel == "decode" and self.block_m < 64:
            raise TuningError(
                f"join with blocks of {self.block_m} tokens: decode joins planes from 64 on"
            )

    @property
    def blocks(self) -> dict[str, Any]:
        """All but for how many tokens, JSON-ready."""
        return {name: value for name, value in asdict(self).items() if name != "max_m"}


@dataclass(frozen=True)
class Gpu:
    """What the rule needs to know of a GPU."""

    name: str
    capability: int  # 90 for sm_90; 0 for others than NVIDIA
    processors: int  # streaming multiprocessors

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory a block may use.

        Source: CUDA C programming guide, compute capabilities.
        """
        kib = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
        return kib.get(self.capability, 64) * 1024

    @property
    def tensor_memory(self) -> bool:
        """Whether tensor cores sum in a memory of their own (sm_100), which limits blocks."""
        return 100 <= self.capability < 120

    @property
    def asynchronous_products(self) -> bool:
        """Whether tensor cores work beside the program that gave them a product."""
        return 90 <= self.capability < 120

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before the one it depends on has ended."""
        return self.capability >= 90


def longest_step(k: int, group_size: int, row_scaled: bool) -> int:
    """Words of a row that one turn may take.

    Scales of two levels are spread over the words of a turn; those of one level are not, and a turn
    takes one group of each plane.
    """
    plane = plane_length(k)
    return plane if row_scaled else min(plane, group_size)


def choice_for(choices: Sequence[Choice], m: int) -> Choice:
    """The choice that takes ``m`` tokens."""
    return next(choice for choice in choices if choice.max_m is None or m <= choice.max_m)
