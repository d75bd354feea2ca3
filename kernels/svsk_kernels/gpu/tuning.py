# SPDX-License-Identifier: Apache-2.0
"""Which kernel takes how many tokens, and in what blocks.

Tables measured per GPU, and a rule for the others.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any, Final, Literal, TypeVar

from svsk_kernels.errors import KernelError
from svsk_kernels.gpu.repack_base import ROW_PAD, plane_length
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "GROUP_SIZES",
    "Choice",
    "Gpu",
    "TuningError",
    "TuningTable",
    "choice_for",
    "choices_for",
    "heuristic_choices",
    "invariant_choices",
    "load_table",
    "longest_step",
    "table_name",
]

_Made = TypeVar("_Made")

MAX_SPLIT_K: Final = 8
"""More splits cost more in partial sums than they bring in parallelism."""

GROUP_SIZES: Final = (16, 32, 64)
"""Weights per scale that the kernels take."""

FOLD_FROM: Final = 1025
"""Tokens from which it is faster to write the weight out first, where nothing was measured."""


class TuningError(KernelError):
    """A table of configurations cannot be used. The message names the file and the entry."""


_ALLOWED: Final = {
    "kernel": ("decode", "gemm", "fold"),
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128),
    "step": (16, 32, 64),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "split_k": tuple(range(1, 65)),
    "pdl": (False, True),
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

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed or type(value) is not type(allowed[0]):
                raise TuningError(f"{name} {value!r}: expected one of {allowed}")
        if self.max_m is not None and (type(self.max_m) is not int or self.max_m < 1):
            raise TuningError(f"max_m {self.max_m!r}: expected a number of tokens, or null for any")
        if self.split_k > 1 and self.kernel != "decode":
            raise TuningError(
                f"split_k {self.split_k} with kernel {self.kernel}: only decode splits the columns"
            )

    @property
    def blocks(self) -> dict[str, Any]:
        """All but for how many tokens, JSON-ready."""
        return {name: value for name, value in asdict(self).items() if name != "max_m"}


@dataclass(frozen=True)
class Entry:
    """Choices of one layer shape, by rising ``max_m``; the last takes any number of tokens.

    Raises:
        TuningError: the choices leave a number of tokens out, or do not fit the shape.
    """

    n: int
    k: int
    group_size: int
    choices: tuple[Choice, ...]
    row_scaled: bool = False  # scales of two levels

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise TuningError(f"group_size {self.group_size!r}: expected one of {GROUP_SIZES}")
        if type(self.row_scaled) is not bool:
            raise TuningError(f"row_scaled {self.row_scaled!r}: expected true or false")
        limits = [choice.max_m for choice in self.choices]
        rising = [limit for limit in limits[:-1] if limit is not None]
        if (
            not limits
            or limits[-1] is not None
            or len(rising) < len(limits) - 1
            or rising != sorted(set(rising))
        ):
            raise TuningError(f"max_m {limits}: expected rising numbers, and null last")
        longest = longest_step(self.k, self.group_size, self.row_scaled)
        for choice in self.choices:
            if choice.kernel != "fold" and longest % choice.step:
                raise TuningError(
                    f"step {choice.step} must divide {longest}: the plane {plane_length(self.k)},"
                    f" or with scales of one level the group {self.group_size} if that is shorter"
                )

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Entry":
        """From an entry of a table's JSON."""
        return _made(
            cls,
            {**raw, "choices": tuple(_made(Choice, choice) for choice in raw.get("choices", ()))},
        )


@dataclass(frozen=True)
class TuningTable:
    """What was measured on one GPU.

    Raises:
        TuningError: a schema of another version.
    """

    device: str
    triton: str
    entries: tuple[Entry, ...]
    schema_version: int = 1

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise TuningError(f"schema_version {self.schema_version!r}: this package reads 1")

    @classmethod
    def from_json(cls, text: str) -> "TuningTable":
        """Read what :meth:`to_json` wrote.

        Raises:
            TuningError: it is not JSON, or not a table.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise TuningError(f"not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise TuningError(f"a {type(raw).__name__}, expected an object")
        return _made(cls, {**raw, "entries": tuple(map(Entry.of, raw.get("entries", ())))})

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def _made(kind: type[_Made], raw: Mapping[str, Any]) -> _Made:
    """A dataclass from JSON; a key too many or too few is an error that names it."""
    try:
        return kind(**raw)
    except TypeError as error:
        raise TuningError(
            f"{kind.__name__}: {str(error).partition(') ')[2]} (known:"
            f" {', '.join(kind.__annotations__)})"
        ) from error


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
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before the one it depends on has ended."""
        return self.capability >= 90


def table_name(device: str) -> str:
    """File name of a GPU's table.

    Its name in lower case, other characters than letters and digits as one dash.
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@lru_cache(maxsize=32)
def load_table(device: str) -> TuningTable | None:
    """The table shipped for a GPU, or None.

    Raises:
        TuningError: the file is not a valid table.
    """
    file = resources.files("svsk_kernels") / "configs" / table_name(device)
    if not file.is_file():
        return None
    try:
        return TuningTable.from_json(file.read_text(encoding="utf-8"))
    except TuningError as error:
        raise TuningError(f"{file}: not a valid table of kernel configurations: {error}") from error


def longest_step(k: int, group_size: int, row_scaled: bool) -> int:
    """Words of a row that one turn may take.

    Scales of two levels are spread over the words of a turn; those of one level are not, and a turn
    takes one group of each plane.
    """
    plane = plane_length(k)
    return plane if row_scaled else min(plane, group_size)


def heuristic_choices(
    gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool = False
) -> tuple[Choice, ...]:
    """Choices where nothing was measured.

    Decode fills the GPU twice by splitting the columns, the same way for every number of tokens
    (not on AMD, where nobody has checked that the partial sums are seen in time); a step of 32
    words keeps the activations of 64 and more tokens in shared memory.
    """
    plane = plane_length(k)
    long = longest_step(k, group_size, row_scaled)
    short = min(long, 32)
    programs = ceil_div(n, ROW_PAD) * ROW_PAD // 64
    steps = ceil_div(k, 4 * plane)
    split_k = (
        max(1, min(ceil_div(2 * gpu.processors, programs), steps // 2, MAX_SPLIT_K))
        if gpu.capability
        else 1
    )
    split_k = ceil_div(steps, ceil_div(steps, split_k))  # no empty parts
    pdl = gpu.dependent_launch
    choices = [
        Choice(kernel="decode", max_m=16, block_m=16, step=long, split_k=split_k, pdl=pdl),
        Choice(kernel="decode", max_m=32, block_m=32, step=long, split_k=split_k, pdl=pdl),
        Choice(kernel="decode", max_m=64, block_m=64, step=short, split_k=split_k, pdl=pdl),
    ]
    # With 128 tokens Triton 3.6 asks for 544 of sm_100's 512 columns of tensor memory, and then
    # drops the code.
    tokens = 64 if 100 <= gpu.capability < 120 else 128
    stages = 3 if gpu.shared_memory > 128 * 1024 else 2
    choices.append(
        Choice(
            kernel="gemm",
            max_m=FOLD_FROM - 1,
            block_m=tokens,
            block_n=128,
            step=short,
            num_warps=8,
            num_stages=stages,
        )
    )
    return (*choices, Choice(kernel="fold"))


def invariant_choices(
    gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool = False
) -> tuple[Choice, ...]:
    """The one choice for any number of tokens, so that none decides a row's bits.

    That of the rule for 64 tokens: of those that read the weight once for few tokens, it reads it
    least often for many. Nothing is measured.
    """
    chosen = heuristic_choices(gpu, n, k, group_size, row_scaled)
    (many,) = (choice for choice in chosen if choice.kernel == "decode" and choice.max_m == 64)
    return (replace(many, max_m=None),)


@lru_cache(maxsize=4096)
def choices_for(
    gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool = False
) -> tuple[Choice, ...]:
    """Choices for a layer of ``n`` rows and ``k`` columns: measured ones, or those of the rule."""
    table = load_table(gpu.name)
    for entry in table.entries if table else ():
        stored = (entry.n, entry.k, entry.group_size, entry.row_scaled)
        if stored == (n, k, group_size, row_scaled):
            return entry.choices
    return heuristic_choices(gpu, n, k, group_size, row_scaled)


def choice_for(choices: Sequence[Choice], m: int) -> Choice:
    """The choice that takes ``m`` tokens."""
    return next(choice for choice in choices if choice.max_m is None or m <= choice.max_m)
