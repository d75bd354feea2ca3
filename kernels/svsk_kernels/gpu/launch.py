# SPDX-License-Identifier: Apache-2.0
"""Launching the Triton kernels: shapes, grids and workspaces."""

import threading
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

from svsk_kernels.gpu.decode import decode_kernel
from svsk_kernels.gpu.fold import fold_kernel
from svsk_kernels.gpu.gemm import gemm_kernel
from svsk_kernels.gpu.repack_sidecar import FOLD_ROWS, PlanarSidecar, Tiles, v_pitch
from svsk_kernels.gpu.shrink import shrink_kernel
from svsk_kernels.gpu.tuning import Choice
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "FOLD_WARPS",
    "INTERPRETED",
    "Base",
    "counters",
    "fold",
    "fold_constants",
    "matmul_constants",
    "matmul_folded",
    "packed_matmul",
    "product_type",
    "rows_at_a_time",
    "shrink",
    "shrink_constants",
    "shrink_warps",
]

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the CPU and in float32."""

_TYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_FOLD_BYTES: Final = 128 << 20
"""Weight written out at a time."""

FOLD_WARPS: Final = 8
_COUNTERS: Final = 1 << 15
_STREAMS: Final = 16


@dataclass(frozen=True)
class Base:
    """Base of a layer as the kernels read it, see :mod:`svsk_kernels.gpu.repack_sidecar`."""

    words: torch.Tensor  # int16 [padded N, padded K / 4]
    scale: torch.Tensor  # [groups, padded N], or scale words [runs, padded N] with row_scale
    n: int
    k: int
    plane: int
    group_size: int
    quad8: bool
    row_scale: torch.Tensor | None = None  # [padded N]; None: scales of one level

    @property
    def n_padded(self) -> int:
        """Rows with padding."""
        return self.words.shape[0]

    @property
    def k_padded(self) -> int:
        """Columns with padding."""
        return self.words.shape[1] * 4

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of the layout."""
        return {
            "PLANE": self.plane,
            "GROUP": self.group_size,
            "EVEN_K": self.k == self.k_padded,
            "QUAD8": self.quad8,
        }


class _Counters:
    """Zeroed counters for programs that meet, apart for every stream of a device.

    Kernels leave them zero.

    The shrink kernel has counters of its own: a kernel launched with ``pdl`` runs, and counts,
    beside it. All are allocated at the first use on a device, which the warm-up makes before any
    graph is captured. Graphs captured on one stream must not be replayed at the same time on
    several.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tensors: dict[torch.device, torch.Tensor] = {}
        self._rows: dict[tuple[torch.device, int], int] = {}

    def get(self, device: torch.device) -> torch.Tensor:
        """Int32 [2, _COUNTERS] of the current stream.

        Those of shrink, and those of decode, which may run beside it.

        Raises:
            RuntimeError: more streams than there are rows, or a first use while a graph is being
                captured.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        with self._lock:
            if device not in self._tensors:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"{device}: the SVSK kernels run for the first time while a CUDA graph is"
                        " being captured. Call the layer once before (SvskMatmul.warm_up does)."
                    )
                self._tensors[device] = torch.zeros(
                    _STREAMS, 2, _COUNTERS, dtype=torch.int32, device=device
                )
            row = self._rows.setdefault(
                (device, stream), sum(known == device for known, _ in self._rows)
            )
        if row >= _STREAMS:
            raise RuntimeError(
                f"{device}: the SVSK kernels were called on more than {_STREAMS} streams."
            )
        return self._tensors[device][row]

    def busy(self, device: torch.device) -> int:
        """How many counters of all streams are not zero, which none must be.

        Waits for the device.
        """
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return int(self._tensors[device].count_nonzero()) if device in self._tensors else 0

    def reset(self, device: torch.device) -> None:
        """Zero all counters of a device.

        Memory that an engine put to sleep comes back with any content.
        """
        if device in self._tensors:
            self._tensors[device].zero_()


counters: Final = _Counters()


def product_type(dtype: torch.dtype) -> Any:
    """Triton's dtype of matrix products: that of the activations, float32 in the interpreter."""
    return tl.float32 if INTERPRETED else _TYPES[dtype]


def _types(dtype: torch.dtype, asm: bool | None) -> dict[str, Any]:
    """Dtype of the products, and whether codes are unpacked by inline PTX."""
    native = not INTERPRETED and torch.version.hip is None
    return {
        "DTYPE": product_type(dtype),
        "ASM": native if asm is None else asm,
    }


def _options(choice: Choice, pdl: bool = False) -> dict[str, Any]:
    """Compiler options; the interpreter takes none."""
    if INTERPRETED:
        return {}
    options: dict[str, Any] = {"num_warps": choice.num_warps, "enable_fp_fusion": True}
    return options | ({"launch_pdl": True} if pdl else {})


def x_stride(x: torch.Tensor) -> int:
    """Distance of rows.

    A single row may have any, which would have the kernels compiled again for it.
    """
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def shrink_warps(tiles: Tiles) -> int:
    """Warps of the shrink kernel: masks of single columns take the registers of twice as many."""
    return 4 if tiles.aligned else 8


def shrink_constants(block_m: int, num_bits: int, tiles: Tiles, pdl: bool) -> dict[str, Any]:
    """Compile-time constants of the shrink kernel, its dtype left out."""
    stages = 2 if num_bits == 4 and block_m == 32 else 3
    return {
        "BLOCK_M": block_m,
        "BITS": num_bits,
        "LONG_TILES": tiles.long,
        "ALIGNED": tiles.aligned,
        "PDL": pdl,
        "STAGES": stages if tiles.aligned else 1,  # single columns are not copied ahead
    }


def matmul_constants(
    choice: Choice, sidecar_bits: int, has_bias: bool, pdl: bool
) -> dict[str, Any]:
    """Compile-time constants of the decode and gemm kernels, those of layout and dtype left out."""
    constants = {
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "STEP": choice.step,
        "SIDECAR_BITS": sidecar_bits,
        "HAS_BIAS": has_bias,
        "STAGES": choice.num_stages,
    }
    if choice.kernel == "decode":
        constants |= {
            "SPLIT_K": choice.split_k,
            "SCALE_WEIGHTS": choice.block_m >= 64,
            "PDL": pdl and sidecar_bits > 0,
        }
    return constants


def fold_constants(sidecar_bits: int) -> dict[str, Any]:
    """Compile-time constants of the fold kernel, those of layout and dtype left out."""
    return {"BLOCK_N": FOLD_ROWS, "SIDECAR_BITS": sidecar_bits}


def shrink(
    x: torch.Tensor, sidecar: PlanarSidecar, num_bits: int, tiles: Tiles, *, pdl: bool = False
) -> torch.Tensor:
    """``z = gain * (V x)`` over the step of U.

    Args:
        x: [M, K], its last axis contiguous.
        sidecar: run-time tensors.
        num_bits: 4 or 8, as they were packed.
        tiles: what all column tiles have in common.
        pdl: let the next kernel start beside this one.

    Returns:
        [M, C] in the dtype of ``x``; padding columns hold anything.
    """
    m = x.shape[0]
    block = (
        32 if m > 16 and tiles.aligned else 16
    )  # with odd edges, masks for 32 tokens would not fit the registers
    z = x.new_empty(m, sidecar.gain.numel())
    num_jobs, blocks = sidecar.jobs.shape[0], ceil_div(m, block)
    v_rows = sidecar.v_table.shape[1]
    partial = x.new_empty(num_jobs * m * 16 if tiles.long else 1, dtype=torch.float32)
    counts = counters.get(x.device)[0]
    if tiles.long and num_jobs * blocks > _COUNTERS:
        counts = x.new_zeros(num_jobs * blocks, dtype=torch.int32)
    options = {} if INTERPRETED else {"num_warps": shrink_warps(tiles), "enable_fp_fusion": True}
    shrink_kernel[(num_jobs, blocks)](
        x,
        sidecar.v,
        sidecar.gain,
        sidecar.v_table,
        sidecar.jobs,
        z,
        partial,
        counts,
        m,
        x_stride(x),
        v_pitch(x.shape[1], num_bits),
        v_rows,
        z.stride(0),
        **shrink_constants(block, num_bits, tiles, pdl),
        DTYPE=_types(x.dtype, None)["DTYPE"],
        **options,
    )
    return z


def packed_matmul(
    x: torch.Tensor,
    base: Base,
    sidecar: PlanarSidecar | None,
    num_bits: int,
    bias: torch.Tensor | None,
    choice: Choice,
    tiles: Tiles,
    *,
    asm: bool | None = None,
) -> torch.Tensor:
    """``x W_hat^T + bias`` by the decode or the gemm kernel.

    Args:
        x: [M, K], bfloat16 or float16, its last axis contiguous.
        base: of the layer.
        sidecar: None for none.
        num_bits: of the factors as packed.
        bias: [N] or None.
        choice: kernel and blocks; not ``fold``.
        tiles: what all column tiles have in common.
        asm: unpack by inline PTX; None where it can be.

    Returns:
        Contiguous [M, N] of the dtype of ``x``.
    """
    m, decode = x.shape[0], choice.kernel == "decode"
    # What decode writes is allocated before shrink's own workspace is freed: the two may run side
    # by side.
    y = x.new_empty(m, base.n)
    partial = x.new_empty(
        choice.split_k * m * base.n_padded if choice.split_k > 1 else 1, dtype=torch.float32
    )
    pdl = decode and choice.pdl and not INTERPRETED and sidecar is not None
    z = x if sidecar is None else shrink(x, sidecar, num_bits, tiles, pdl=pdl)
    side = (z, z, z, z) if sidecar is None else (sidecar.row_table, sidecar.u, z, sidecar.z_used)
    left = (x, base.words, base.scale, base.row_scale, x if bias is None else bias, *side, y)
    sizes = (m, base.n, base.k, base.n_padded, x_stride(x), base.words.stride(0), x_stride(z))
    bits = num_bits if sidecar is not None else 0
    constants = (
        base.constants
        | _types(x.dtype, asm)
        | matmul_constants(choice, bits, bias is not None, pdl)
    )
    steps = base.words.shape[1] // choice.step
    rows, tokens = base.n_padded // choice.block_n, ceil_div(m, choice.block_m)
    if not decode:
        gemm_kernel[(tokens, rows)](*left, *sizes, steps, **constants, **_options(choice))
        return y
    if choice.split_k > 1 and rows * tokens > _COUNTERS:
        raise RuntimeError(
            f"{rows} x {tokens} programs with split columns need more than {_COUNTERS} counters."
        )
    decode_kernel[(rows, choice.split_k, tokens)](
        *left,
        partial,
        counters.get(x.device)[1],
        *sizes,
        steps,
        ceil_div(steps, choice.split_k),
        **constants,
        **_options(choice, pdl),
    )
    return y


def fold(
    base: Base,
    sidecar: PlanarSidecar | None,
    num_bits: int,
    dtype: torch.dtype,
    rows: slice,
    *,
    asm: bool | None = None,
) -> torch.Tensor:
    """Some rows of ``W_hat`` rounded once to ``dtype``.

    Args:
        base: of the layer.
        sidecar: None for none.
        num_bits: of the factors as packed.
        dtype: bfloat16 or float16.
        rows: its start a multiple of FOLD_ROWS; its stop at most N.
        asm: see :func:`packed_matmul`.

    Returns:
        [rows, K]; a view into a tensor with as many rows as whole blocks need.
    """
    count = rows.stop - rows.start
    blocks = ceil_div(count, FOLD_ROWS)
    out = torch.empty(blocks * FOLD_ROWS, base.k, dtype=dtype, device=base.words.device)
    scale = base.scale
    tensors = (
        (scale,) * 6
        if sidecar is None
        else (
            sidecar.row_table,
            sidecar.u,
            sidecar.v,
            sidecar.gain,
            sidecar.slot_table,
            sidecar.block_slots,
        )
    )
    options = {} if INTERPRETED else {"num_warps": FOLD_WARPS, "enable_fp_fusion": True}
    fold_kernel[(blocks, base.k_padded // (4 * base.plane))](
        base.words,
        scale,
        base.row_scale,
        *tensors,
        out,
        rows.start,
        base.k,
        base.n_padded,
        base.words.stride(0),
        v_pitch(base.k, num_bits),
        **fold_constants(num_bits if sidecar is not None else 0),
        **base.constants,
        **_types(dtype, asm),
        **options,
    )
    return out[:count]


def rows_at_a_time(k: int, itemsize: int) -> int:
    """Rows of ``k`` columns that :func:`matmul_folded` writes out at a time: whole FOLD_ROWS."""
    return max(FOLD_ROWS, _FOLD_BYTES // (k * itemsize) // FOLD_ROWS * FOLD_ROWS)


def matmul_folded(
    x: torch.Tensor,
    base: Base,
    sidecar: PlanarSidecar | None,
    num_bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``x W_hat^T + bias`` by folding some rows at a time and an ordinary matrix product.

    Arguments as above.
    """
    rows = rows_at_a_time(base.k, x.element_size())
    if rows >= base.n:
        return torch.nn.functional.linear(
            x, fold(base, sidecar, num_bits, x.dtype, slice(0, base.n)), bias
        )
    y = x.new_empty(x.shape[0], base.n)
    for start in range(0, base.n, rows):
        part = slice(start, min(start + rows, base.n))
        weight = fold(base, sidecar, num_bits, x.dtype, part)
        if bias is None:
            torch.mm(x, weight.T, out=y[:, part])
        else:
            torch.addmm(bias[part], x, weight.T, out=y[:, part])
    return y
