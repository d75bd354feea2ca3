# SPDX-License-Identifier: Apache-2.0
"""The kernels as they are launched where nothing was measured.

All that the rule chooses among, compiled for each target.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final, Literal

import torch
import triton.language as tl

from svsk_kernel_tools.binary.aot import Arch
from svsk_kernel_tools.binary.case import KernelCase
from svsk_kernels.gpu.choice import Choice, Gpu
from svsk_kernels.gpu.decode import decode_kernel
from svsk_kernels.gpu.error_feedback import MAX_COLUMNS, feedback_kernel
from svsk_kernels.gpu.error_feedback import ROWS as FEEDBACK_ROWS
from svsk_kernels.gpu.error_feedback import WARPS as FEEDBACK_WARPS
from svsk_kernels.gpu.fold import fold_kernel
from svsk_kernels.gpu.folded_product import FOLD_WARPS, fold_constants
from svsk_kernels.gpu.gemm import gemm_kernel
from svsk_kernels.gpu.launch import (
    matmul_constants,
    shrink_constants,
    shrink_warps,
)
from svsk_kernels.gpu.repack_base import plane_length
from svsk_kernels.gpu.repack_sidecar import Tiles
from svsk_kernels.gpu.rule import candidates
from svsk_kernels.gpu.shrink import shrink_kernel

__all__ = ["cases"]

_PROCESSORS: Final = 132  # without meaning here
_WIDE: Final = 128  # rows of the blocks of 8 warps
_SHAPE: Final = (2560, 9728)  # rows and columns of a layer whose columns are split
_UNALIGNED: Final = ("m", "steps", "steps_per_split", "row_start", "counters")

_POINTERS: Final = {
    "words": "*i16",
    "row_table": "*i32",
    "u": "*u8",
    "v": "*u8",
    "gain": "*fp32",
    "z_used": "*u8",
    "v_table": "*i32",
    "jobs": "*i32",
    "slot_table": "*i32",
    "block_slots": "*i32",
    "partial": "*fp32",
    "counters": "*i32",
}
_ACTIVATIONS: Final = ("x", "scale", "row_scale", "bias", "z", "y", "out")

# Instructions of the main loop per weight: what was measured with Triton 3.6 and 3.9 (scales of two
# levels, "rows", and groups of 16: with 3.9 only), and a tenth more. For targets with mma.sync, for
# sm_90 and for sm_100; none for AMD, whose compiler emulates bfloat16.
_CAPS: Final = {
    "decode16-g64": (3.6, 3.8, 4.8),
    "decode16-g64-quad8": (5.3, 5.5, 6.5),
    "decode16-g64-fp16": (3.3, 3.5, 4.3),
    "decode16-g32": (5.2, 5.6, 7.4),
    "decode16-g64-rows": (3.6, 3.9, 4.9),
    "decode16-g32-rows": (3.6, 3.9, 4.7),
    "decode16-g32-rows-quad8": (5.3, 5.6, 6.3),
    "decode16-g32-rows-fp16": (3.5, 3.8, 4.4),
    "decode16-g16-rows": (4.0, 4.3, 5.0),
    "decode16-g16": (8.1, 9.1, 12.5),
    "decode16-unsplit-bias": (3.6, 3.9, 4.8),
    "decode32-g64": (4.5, 4.2, 5.1),
    "decode64-g64": (6.7, 5.4, 7.7),
    "wide-g64": (8.2, 5.1, 5.4),
    "wide-g32-rows": (8.3, 5.5, 5.4),
    "gemm-g64": (8.4, 5.7, 7.9),
    "gemm-g64-quad8": (9.8, 7.4, 9.6),
    "gemm-g64-fp16": (8.3, 5.5, 7.9),
    "decode64-g32-rows": (6.0, 5.5, 7.0),
    "gemm-g32-rows": (7.9, 5.5, 7.9),
    "gemm-g16-rows": (7.9, 5.5, 7.9),
}

# Likewise of the blocks that sm_90 alone has.
_TALL_CAPS: Final = {
    "tall64-g64": 3.7,
    "tall64-g32-rows": 4.0,
    "tall128-g64": 3.9,
    "tall128-g64-quad8": 5.5,
    "tall128-g64-fp16": 3.9,
    "tall128-g32-rows": 4.1,
    "tall128-g16-rows": 4.5,
    "tall128-g16": 6.0,
}


def cases(arch: Arch) -> list[KernelCase]:
    """All cases of a target."""
    return [*_matmuls(arch), *_shrinks(arch), *_folds(arch), *_feedbacks()]


def _matmuls(arch: Arch) -> Iterator[KernelCase]:
    """Scales of one level."""
    bfloat = torch.bfloat16
    for name, choice in _blocks(arch, 64, False).items():
        yield _matmul(arch, f"{name}-g64", choice, 64, bfloat, bits=4)
        if name in ("decode16", "gemm", "tall128"):
            yield _matmul(arch, f"{name}-g64-quad8", choice, 64, bfloat, quad8=True)
            yield _matmul(arch, f"{name}-g64-fp16", choice, 64, torch.float16)
    few = _blocks(arch, 32, False)["decode16"]  # other steps are no longer than either group
    yield _matmul(arch, "decode16-g32", few, 32, bfloat, bits=4)
    yield from _row_scaled(arch)
    few = _blocks(arch, 64, False)["decode16"]
    whole = replace(few, split_k=1)
    yield _matmul(arch, "decode16-unsplit-bias", whole, 64, bfloat, has_bias=True)


def _row_scaled(arch: Arch) -> Iterator[KernelCase]:
    """Scales of two levels, and groups of 16 with those of one."""
    bfloat = torch.bfloat16
    for group_size in (64, 32, 16):
        blocks = _blocks(arch, group_size, True)
        few, name = blocks["decode16"], f"g{group_size}-rows"
        yield _matmul(arch, f"decode16-{name}", few, group_size, bfloat, bits=4, row_scaled=True)
        if group_size == 32:
            for suffix, dtype, quad8 in (("quad8", bfloat, True), ("fp16", torch.float16, False)):
                full_name = f"decode16-{name}-{suffix}"
                yield _matmul(arch, full_name, few, group_size, dtype, quad8=quad8, row_scaled=True)
            for block in ("decode64", "wide", *(["tall64"] if "tall64" in blocks else [])):
                full_name = f"{block}-{name}"
                yield _matmul(arch, full_name, blocks[block], group_size, bfloat, row_scaled=True)
        if group_size != 64:
            for block in ("gemm", *(["tall128"] if "tall128" in blocks else [])):
                full_name = f"{block}-{name}"
                yield _matmul(arch, full_name, blocks[block], group_size, bfloat, row_scaled=True)
    if isinstance(arch, int):  # AMD's warps of 64 lanes copy these 16 words a row by 8 bytes
        one_level = _blocks(arch, 16, False)["decode16"]
        yield _matmul(arch, "decode16-g16", one_level, 16, bfloat)
    if "tall128" in blocks:  # half a turn
        yield _matmul(arch, "tall128-g16", _blocks(arch, 16, False)["tall128"], 16, bfloat)


def _blocks(arch: Arch, group_size: int, row_scaled: bool) -> dict[str, Choice]:
    """What the rule chooses among, by name, its columns split in as many parts as they can be.

    ``wide``: decode in gemm's blocks; ``tall``: in blocks of twice as many rows.
    """
    capability = arch if isinstance(arch, int) else 0
    gpu = Gpu(name="", capability=capability, processors=_PROCESSORS)
    found = {}
    for choice in candidates(gpu, *_SHAPE, group_size, row_scaled):
        if choice.kernel != "fold":
            tokens = f"{choice.block_m}"
            names = {_WIDE: "wide", 2 * _WIDE: f"tall{tokens}"}
            name = names.get(choice.block_n, f"decode{tokens}")
            found["gemm" if choice.kernel == "gemm" else name] = choice
    return found


def _matmul(
    arch: Arch,
    name: str,
    choice: Choice,
    group_size: int,
    dtype: torch.dtype,
    *,
    bits: Literal[4, 8] = 8,
    quad8: bool = False,
    has_bias: bool = False,
    row_scaled: bool = False,
) -> KernelCase:
    fn = decode_kernel if choice.kernel == "decode" else gemm_kernel
    layout = {"PLANE": plane_length(_SHAPE[1]), "GROUP": group_size, "EVEN_K": True, "QUAD8": quad8}
    constants = (
        layout
        | _types(arch, dtype)
        | matmul_constants(choice, bits, has_bias, pdl=choice.pdl)
        | _one_level(row_scaled)
    )
    options: dict[str, Any] = {"num_warps": choice.num_warps}
    if choice.pdl:
        options["launch_pdl"] = True
    return KernelCase(
        name=name,
        fn=fn,
        signature=_signature(fn, constants, dtype, row_scaled),
        constexprs=constants,
        aligned=_aligned(fn, constants),
        options=options,
        weights_per_thread=choice.block_n * 4 * choice.step / (_threads(arch) * choice.num_warps),
        max_instructions_per_weight=_cap(name, arch),
        partial_sums=choice.split_k > 1,
        packed_weight_pointer="words",
    )


def _shrinks(arch: Arch) -> Iterator[KernelCase]:
    for name, bits, block, tiles in (
        ("shrink16-8", 8, 16, Tiles(long=False, aligned=True)),
        ("shrink32-8-long", 8, 32, Tiles(long=True, aligned=True)),
        ("shrink32-4", 4, 32, Tiles(long=False, aligned=True)),
        ("shrink16-8-odd", 8, 16, Tiles(long=True, aligned=False)),
        ("shrink16-4-odd", 4, 16, Tiles(long=False, aligned=False)),
    ):
        pdl = isinstance(arch, int) and arch >= 90
        constants = shrink_constants(block, bits, tiles, pdl) | {"DTYPE": tl.bfloat16}
        yield KernelCase(
            name=name,
            fn=shrink_kernel,
            signature=_signature(shrink_kernel, constants, torch.bfloat16),
            constexprs=constants,
            aligned=_aligned(shrink_kernel, constants),
            options={"num_warps": shrink_warps(tiles)},
            partial_sums=tiles.long,
            packed_weight_pointer="v" if tiles.aligned else None,
            mma="any",
        )


def _folds(arch: Arch) -> Iterator[KernelCase]:
    for name, bits, quad8, group_size, row_scaled in (
        ("fold-base", 0, False, 64, False),
        ("fold-8", 8, False, 64, False),
        ("fold-4-quad8", 4, True, 64, False),
        ("fold-8-g16-rows", 8, False, 16, True),
    ):
        layout = {"PLANE": 64, "GROUP": group_size, "EVEN_K": True, "QUAD8": quad8}
        constants = (
            layout | _types(arch, torch.bfloat16) | fold_constants(bits) | _one_level(row_scaled)
        )
        yield KernelCase(
            name=name,
            fn=fold_kernel,
            signature=_signature(fold_kernel, constants, torch.bfloat16, row_scaled),
            constexprs=constants,
            aligned=_aligned(fold_kernel, constants),
            options={"num_warps": FOLD_WARPS},
            mma="any" if bits else "none",
        )


def _feedbacks() -> Iterator[KernelCase]:
    for name, columns, codes, descent in (
        ("feedback-int4", MAX_COLUMNS, (-8, 7, False), False),
        ("feedback-quad8-descent", MAX_COLUMNS, (-8, 7, True), True),
        ("feedback-8bit", 32, (-127, 127, False), False),
    ):
        constants = dict(zip(("LOW", "HIGH", "QUAD8"), codes, strict=True))
        constants |= {"DESCENT": descent, "COLUMNS": columns, "BLOCK_N": FEEDBACK_ROWS}
        pointers = ("work", "coupling", "pivots", "scale", "values", "levels", "errors")
        sizes = ("n", "count", "scale_batch", "scale_column")
        yield KernelCase(
            name=name,
            fn=feedback_kernel,
            signature=dict.fromkeys(pointers, "*fp32") | dict.fromkeys(sizes, "i32"),
            constexprs=constants,
            aligned=(*pointers, "n", "scale_column"),
            options={"num_warps": FEEDBACK_WARPS},
            mma="none",
        )


def _cap(name: str, arch: Arch) -> float | None:
    if not isinstance(arch, int):
        return None
    if name in _TALL_CAPS:
        return _TALL_CAPS[name]
    return _CAPS[name][{90: 1, 100: 2}.get(arch, 0)]


def _types(arch: Arch, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
        "ASM": isinstance(arch, int),
    }


def _threads(arch: Arch) -> int:
    """Of a warp."""
    return 32 if isinstance(arch, int) else 64


def _one_level(row_scaled: bool) -> dict[str, None]:
    """The row scale as a constant where there is none."""
    return {} if row_scaled else {"row_scale": None}


def _signature(
    fn: Any, constants: dict[str, Any], dtype: torch.dtype, row_scaled: bool = False
) -> dict[str, str]:
    float_type = "*bf16" if dtype == torch.bfloat16 else "*fp16"
    types = _POINTERS | dict.fromkeys(_ACTIVATIONS, float_type)
    if row_scaled:
        types["scale"] = "*i32"  # words of four codes: planes are no shorter than groups
    return {name: types.get(name, "i32") for name in fn.arg_names if name not in constants}


def _aligned(fn: Any, constants: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in fn.arg_names if name not in constants and name not in _UNALIGNED)
