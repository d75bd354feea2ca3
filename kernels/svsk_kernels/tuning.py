# SPDX-License-Identifier: Apache-2.0
"""Which kernel takes how many tokens, and in what blocks: tables measured per GPU, and a rule for the others."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from svsk_kernels.layout import ROW_PAD, plane_length
from svsk_vllm.format.geometry import ceil_div

__all__ = [
    "Choice",
    "Gpu",
    "TuningError",
    "TuningTable",
    "choice_for",
    "choices_for",
    "heuristic_choices",
    "load_table",
    "table_name",
]

MAX_SPLIT: Final = 8
"""More splits cost more in partial sums than they bring in parallelism."""

FOLD_FROM: Final = 1025
"""Tokens from which writing the weight out and multiplying it as usual is faster, where nothing was measured."""


class TuningError(ValueError):
    """A table of configurations cannot be used. The message names the file and the entry."""


class Choice(BaseModel):
    """One kernel with its blocks, for up to ``max_m`` tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: Literal["decode", "gemm", "fold"]
    max_m: Annotated[int, Field(ge=1)] | None = None  # None: any number
    block_m: int = 16  # tokens of a program
    block_n: int = 64  # rows of a program
    step: int = 64  # words of a row per turn of the main loop
    num_warps: int = 4
    num_stages: Annotated[int, Field(ge=1, le=8)] = 3
    split: Annotated[int, Field(ge=1, le=64)] = 1  # parts of the columns (decode only)
    pdl: bool = False  # start beside the kernel that computes z, where the GPU can (decode only)

    @model_validator(mode="after")
    def _is_known(self) -> "Choice":
        allowed = {"block_m": (16, 32, 64, 128, 256), "block_n": (32, 64, 128), "step": (16, 32, 64)}
        allowed["num_warps"] = (1, 2, 4, 8, 16)
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)}: expected one of {values}")
        if self.split > 1 and self.kernel != "decode":
            raise ValueError(f"split {self.split} with kernel {self.kernel}: only decode splits the columns")
        return self


class Entry(BaseModel):
    """Choices of one layer shape, by rising ``max_m``; the last takes any number of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    k: int
    group_size: Literal[32, 64]
    choices: tuple[Choice, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> "Entry":
        limits = [choice.max_m for choice in self.choices]
        known = [limit for limit in limits[:-1] if limit is not None]
        if limits[-1] is not None or len(known) < len(limits) - 1 or known != sorted(set(known)):
            raise ValueError(f"max_m {limits}: expected rising numbers, and null last")
        plane = plane_length(self.k)
        for choice in self.choices:
            if choice.kernel != "fold" and (plane % choice.step or self.group_size % choice.step):
                raise ValueError(f"step {choice.step} must divide the plane {plane} and the group {self.group_size}")
        return self


class TuningTable(BaseModel):
    """What was measured on one GPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    device: str
    triton: str
    entries: tuple[Entry, ...]


class Gpu(BaseModel):
    """What the rule needs to know of a GPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    capability: int  # 90 for sm_90; 0 for others than NVIDIA
    processors: int  # streaming multiprocessors

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory a block may use. Source: CUDA C programming guide, compute capabilities."""
        kib = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
        return kib.get(self.capability, 64) * 1024

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before the one it depends on has ended."""
        return self.capability >= 90


def table_name(device: str) -> str:
    """File name of a GPU's table: its name in lower case, other characters than letters and digits as one dash."""
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
        return TuningTable.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValidationError, json.JSONDecodeError) as error:
        raise TuningError(f"{file}: not a valid table of kernel configurations: {error}") from error


def heuristic_choices(gpu: Gpu, n: int, k: int, group_size: int) -> tuple[Choice, ...]:
    """Choices where nothing was measured.

    Decode fills the GPU twice by splitting the columns, the same way for every number of tokens (not on AMD, where
    nobody has checked that the partial sums are seen in time); a step of 32 words keeps the activations of 64 and more
    tokens in shared memory.
    """
    plane = plane_length(k)
    long, short = min(plane, group_size, 64), min(plane, group_size, 32)
    programs = ceil_div(n, ROW_PAD) * ROW_PAD // 64
    steps = ceil_div(k, 4 * plane)
    split = max(1, min(ceil_div(2 * gpu.processors, programs), steps // 2, MAX_SPLIT)) if gpu.capability else 1
    split = ceil_div(steps, ceil_div(steps, split))  # no empty parts
    pdl = gpu.dependent_launch
    found = [
        Choice(kernel="decode", max_m=16, block_m=16, step=long, split=split, pdl=pdl),
        Choice(kernel="decode", max_m=32, block_m=32, step=long, split=split, pdl=pdl),
        Choice(kernel="decode", max_m=64, block_m=64, step=short, split=split, pdl=pdl),
    ]
    # With 128 tokens Triton 3.6 asks for 544 of sm_100's 512 columns of tensor memory, and then drops the code.
    tokens = 64 if 100 <= gpu.capability < 120 else 128
    stages = 3 if gpu.shared_memory > 128 * 1024 else 2
    found.append(
        Choice(
            kernel="gemm", max_m=FOLD_FROM - 1, block_m=tokens, block_n=128, step=short, num_warps=8, num_stages=stages
        )
    )
    return (*found, Choice(kernel="fold"))


@lru_cache(maxsize=4096)
def choices_for(gpu: Gpu, n: int, k: int, group_size: int) -> tuple[Choice, ...]:
    """Choices for a layer of ``n`` rows and ``k`` columns: measured ones, or those of the rule."""
    table = load_table(gpu.name)
    for entry in table.entries if table else ():
        if (entry.n, entry.k, entry.group_size) == (n, k, group_size):
            return entry.choices
    return heuristic_choices(gpu, n, k, group_size)


def choice_for(choices: Sequence[Choice], m: int) -> Choice:
    """The choice that takes ``m`` tokens."""
    return next(choice for choice in choices if choice.max_m is None or m <= choice.max_m)
