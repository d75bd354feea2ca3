# SPDX-License-Identifier: Apache-2.0
"""The layers and numbers of tokens that are checked before anything is timed."""

from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from svsk_kernel_tools.bench.layers import BenchLayer, Part, random_layer
from svsk_kernel_tools.bench.shapes import GROUP_SIZE, SHAPES, VARIANTS
from svsk_kernels.codebook import Codebook
from svsk_kernels.gpu.choice import Choice, Gpu, choice_for
from svsk_kernels.gpu.repack_base import plane_length
from svsk_kernels.gpu.rule import candidates
from svsk_kernels.gpu.tuning import choices_for

__all__ = ["Case", "cases_for", "checked_choices", "forced_choice"]

_HALF: Final = torch.float16
_BFLOAT: Final = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One layer, numbers of tokens to check it with, and whether every kernel is checked."""

    name: str
    k: int
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    dtype: torch.dtype = _BFLOAT
    codebook: Codebook = "int4"
    group_size: int = GROUP_SIZE
    bias: bool = False
    every_kernel: bool = True
    row_scaled: bool = False

    @property
    def n(self) -> int:
        """Rows of the layer."""
        return sum(part.n for part in self.parts)

    def layer(self, device: torch.device) -> BenchLayer:
        """The layer, with random content."""
        return random_layer(
            self.k,
            self.dtype,
            device,
            self.parts,
            codebook=self.codebook,
            group_size=self.group_size,
            row_scaled=self.row_scaled,
            seed=self.n,
        )


_MIXED: Final = (Part(100, 16, 4, 48, 256), Part(30), Part(126, 24, 8, 32, 96))

_SMALL: Final = (
    Case("rank 16", 512, (Part(256, 16, 8, 64, 256),), (1, 17, 64, 100)),
    Case("no sidecar, bias", 512, (Part(256),), (1, 40, 100), bias=True),
    Case("rank 32 of 4 bits", 1024, (Part(200, 32, 4, 128, 512),), (1, 17, 64, 100)),
    Case("quad8, float16", 512, (Part(256, 16, 8, 64, 256),), (1, 33, 100), _HALF, "quad8"),
    Case("quad8, rank 32 of 4 bits", 768, (Part(128, 32, 4, 64, 256),), (3, 64), _BFLOAT, "quad8"),
    Case(
        "ragged, groups of 32",
        288,
        (Part(33, 24, 8, 16, 128),),
        (1, 17, 100),
        _HALF,
        "quad8",
        32,
        True,
    ),
    Case(
        "ragged, odd tiles, groups of 32",
        96,
        (Part(100, 8, 4, 48, 40),),
        (3, 64, 100),
        _BFLOAT,
        "int4",
        32,
    ),
    Case("parts of different ranks, tiles and bits", 512, _MIXED, (1, 33, 65), bias=True),
    Case("tiles longer than a job", 4608, (Part(200, 16, 8, 0, 0),), (1, 33, 100)),
    Case("rank 512 over the whole matrix", 4608, (Part(200, 512, 4, 0, 0),), (1, 33, 100)),
    Case("rank 131 over the whole matrix", 512, (Part(100, 131, 8, 0, 0),), (1, 64), _HALF),
    Case(
        "row scales, groups of 16",
        1024,
        (Part(256, 16, 8, 64, 256),),
        (1, 17, 64, 100),
        codebook="quad8",
        group_size=16,
        bias=True,
        row_scaled=True,
    ),
    Case(
        "row scales, ragged, groups of 32",
        288,
        (Part(100, 8, 4, 48, 40),),
        (3, 64, 100),
        _HALF,
        group_size=32,
        row_scaled=True,
    ),
    Case("row scales, planes share groups", 192, (Part(130),), (3, 100), row_scaled=True),
)

_QUICK: Final = (
    "rank 16",
    "ragged, groups of 32",
    "parts of different ranks, tiles and bits",
    "tiles longer than a job",
    "row scales, groups of 16",
)

_INTERPRETED: Final = (
    Case("no sidecar, bias", 256, (Part(64),), (5,), _HALF, bias=True),
    Case("rank 16", 256, (Part(64, 16, 8, 32, 128),), (1,), _HALF),
    Case("rank 32 of 4 bits", 256, (Part(64, 32, 4, 64, 128),), (5,), _HALF),
    Case("ragged, quad8, groups of 32", 96, (Part(33, 8, 8, 16, 40),), (3,), _HALF, "quad8", 32),
    Case(
        "parts of different ranks, tiles and bits",
        256,
        (Part(40, 16, 4, 24, 128), Part(10), Part(24, 8, 8, 16, 96)),
        (2,),
        _HALF,
    ),
    Case("tiles longer than a job", 2304, (Part(16, 16, 8, 0, 0),), (2,), _HALF),
    Case(
        "row scales, groups of 16",
        256,
        (Part(40, 8, 8, 16, 40),),
        (3,),
        _HALF,
        "quad8",
        16,
        row_scaled=True,
    ),
)


def cases_for(interpreted: bool, quick: bool) -> tuple[Case, ...]:
    """The cases of a run; in the interpreter always the same small ones."""
    if interpreted:
        return _INTERPRETED
    small = tuple(case for case in _SMALL if not quick or case.name in _QUICK)
    variants = [variant for variant in VARIANTS if variant.rank in (16, 32)][: 1 if quick else None]
    real = [
        Case(
            f"{shape.name} {variant.label}",
            shape.k,
            (Part(shape.n, variant.rank, variant.bits),),
            (1, 33, 100, 1100) if variant == VARIANTS[0] else (1, 100),
            codebook=variant.codebook,
            every_kernel=False,
        )
        for variant in variants
        for shape in (SHAPES[:2] if quick else SHAPES)
    ]
    return (*small, *real)


def forced_choice(
    kernel: str, gpu: Gpu, n: int, k: int, group_size: int, m: int, row_scaled: bool = False
) -> Choice:
    """Blocks for ``m`` tokens of one kernel, whether or not it would be dispatched."""
    layer = (gpu, n, k, group_size, row_scaled)
    dispatched = choice_for(choices_for(*layer), m)
    if dispatched.kernel == kernel:
        return dispatched
    known = [choice for choice in candidates(*layer) if choice.kernel == kernel]
    return next((choice for choice in known if m <= choice.block_m), known[-1])


def checked_choices(case: Case, gpu: Gpu, m: int) -> list[Choice]:
    """What one case runs at ``m`` tokens.

    The dispatched choice, or every kernel, decode with the columns in two.
    """
    size = (case.n, case.k, case.group_size)
    if not case.every_kernel:
        return [choice_for(choices_for(gpu, *size, case.row_scaled), m)]
    changes: dict[str, Any] = {"split_k": min(2, case.k // (4 * plane_length(case.k))) or 1}
    choices = [replace(forced_choice("decode", gpu, *size, m, case.row_scaled), **changes)]
    if m > 33 or gpu.capability == 0:
        choices += [
            forced_choice(kernel, gpu, *size, m, case.row_scaled) for kernel in ("gemm", "fold")
        ]
    return choices
