# SPDX-License-Identifier: Apache-2.0
"""How long a product should take on a GPU, worked out from its data sheet and the compiled kernels.

:mod:`svsk_kernels.gpu.rule` chooses by it where nothing was measured. It was itself compared with
no measurement. A launch takes as long as the slowest of: bytes from memory, bytes from the
second-level cache, issue slots of the busiest multiprocessor, and tensor cores of the busiest
multiprocessor; then a constant for starting and ending, and the sum of split columns. Shares of
what a data sheet promises are the same for these kernels and for a dense product of cuBLAS, but
where a difference was counted in the machine code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from svsk_kernels.gpu.choice import Choice, Gpu
from svsk_kernels.gpu.repack_base import plane_length
from svsk_kernels.gpu.repack_sidecar import rows_at_a_time
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "GPUS",
    "Layer",
    "Sidecar",
    "Speeds",
    "dense_time",
    "instructions_per_weight",
    "marlin_time",
    "predicted_time",
    "speeds_of",
]


@dataclass(frozen=True)
class Speeds:
    """What a GPU's data sheet says."""

    gpu: Gpu
    memory: float  # bytes per second
    cache: float  # bytes per second of the second-level cache, as programs get them
    cache_bytes: float
    tensor: float  # operations per second, bfloat16, dense
    clock: float  # Hz, boost
    shared: int  # bytes of shared memory of a multiprocessor


def _gpu(name: str, capability: int, processors: int) -> Gpu:
    return Gpu(name=name, capability=capability, processors=processors)


# Memory, cache sizes, tensor peaks (without sparsity) and clocks: NVIDIA's data sheets and
# architecture white papers of the A100 80GB SXM4, L40S, H100 SXM5, H200 SXM and B200 (HGX; its
# clock is worked out from the peak). The A100's cache: its white paper's 5120 bytes a clock. The
# other caches' bandwidths stand in no data sheet: estimates after published microbenchmarks.
GPUS: Final = {
    "A100": Speeds(_gpu("A100", 80, 108), 2.04e12, 7.2e12, 40e6, 312e12, 1.41e9, 164 << 10),
    "L40S": Speeds(_gpu("L40S", 89, 142), 0.864e12, 4.5e12, 96e6, 362e12, 2.52e9, 100 << 10),
    "H100": Speeds(_gpu("H100", 90, 132), 3.35e12, 5.5e12, 50e6, 989e12, 1.83e9, 228 << 10),
    "H200": Speeds(_gpu("H200", 90, 132), 4.8e12, 5.5e12, 50e6, 989e12, 1.83e9, 228 << 10),
    "B200": Speeds(_gpu("B200", 100, 148), 8.0e12, 9.0e12, 126e6, 2250e12, 1.86e9, 228 << 10),
}

# Estimates, the same for all kernels, dense ones included.
_MEMORY_SHARE: Final = 0.85  # of the data sheet's bandwidth
_TENSOR_SHARE: Final = 0.75  # of the data sheet's peak: power, clocks, pipelines that run dry
_LAUNCH: Final = 2.0e-6  # seconds from start to end of a kernel that does nothing, in a graph
_LATENCY: Final = 0.8e-6  # seconds from asking for bytes to having them, under load

# Estimates for these kernels.
_ISSUE_SHARE: Final = 0.6  # of the slots of a clock and scheduler
_SPLIT: Final = 1.5e-6  # seconds: barrier, counter, and reading the sums of others
_BESIDE: Final = 0.5e-6  # seconds that shrink takes where the product starts beside it
_SCHEDULERS: Final = 4  # of a multiprocessor
_REGISTERS: Final = 65536  # of a multiprocessor
_WARP_SHARE: Final = 0.25  # of a scheduler's slots that one warp takes
_OLD_PRODUCTS: Final = 0.62  # of the peak that mma.sync reaches on sm_90 and later
_SERIALISED: Final = 90
_WAIT: Final = 100.0
"""Clocks that one wait for tensor cores leaves them idle, unless another program is at work."""

_WAITS: Final = {"joined": 2.5, "planes": 4.0, "serialised": 8.0, "synchronous": 2.0}
"""Waits and barriers of a turn of the main loop, counted in the machine code.

``joined`` and ``planes``: products of sm_90 and later, see ``Choice.join``. ``serialised``: what
ptxas made of them before. ``synchronous``: older tensor cores.
"""


_DENSE_TILES: Final = (
    (256, 128),
    (128, 256),
    (128, 128),
    (128, 64),
    (64, 128),
    (64, 64),
    (128, 16),
)
"""Rows and tokens of cuBLAS's programs."""


@dataclass(frozen=True)
class Sidecar:
    """What a layer has besides its base."""

    rank: int
    bits: int  # of the factors
    row_tiles: int = 1
    column_tiles: int = 1

    def bytes(self, n: int, k: int) -> float:
        """Of factors and gains."""
        values = (n * self.column_tiles + self.row_tiles * k) * self.rank
        return values * self.bits / 8 + self.row_tiles * self.column_tiles * self.rank * 4


@dataclass(frozen=True)
class Layer:
    """A weight, as far as time depends on it."""

    n: int
    k: int
    group_size: int = 64
    row_scaled: bool = False
    quad8: bool = False
    sidecar: Sidecar | None = None

    @property
    def base_bytes(self) -> float:
        """Of codes and scales, at run time."""
        if not self.row_scaled:
            return self.n * self.k * (0.5 + 2 / self.group_size)
        return self.n * (self.k * (0.5 + 1 / self.group_size) + 2)

    def regrouped(self, group_size: int) -> "Layer":
        """The same with groups of another size."""
        return replace(self, group_size=group_size)


# Instructions of the main loop per weight, int4 and bfloat16, counted with Triton 3.9 (see
# docs/benchmarks/kernel-instructions.md). Decode with 16 tokens: scales of one level with groups of
# 64, 32 and 16, then of two levels.
_FEW_TOKENS: Final = {
    80: (2.66, 3.97, 5.88, 3.07, 3.16, 3.45),
    89: (2.72, 3.64, 6.0, 3.06, 3.16, 3.45),
    90: (2.96, 4.41, 7.12, 3.37, 3.44, 3.73),
    100: (3.75, 5.98, 10.16, 4.06, 4.06, 4.38),
}
# Larger blocks: one level with groups of 64, two levels with groups of 32. By target and tokens of
# a block; 128 and 256 stand for decode and gemm in blocks of as many rows and 8 warps.
_MANY_TOKENS: Final = {
    (80, 32): (3.49, 3.56),
    (80, 64): (4.94, 5.12),
    (80, 128): (6.59, 6.66),
    (89, 32): (3.53, 3.59),
    (89, 64): (5.03, 5.31),
    (89, 128): (7.47, 7.52),
    (90, 32): (3.27, 3.48),
    (90, 64): (4.27, 4.53),
    (90, 128): (3.73, 4.28),
    (90, 256): (3.49, 3.70),
    (100, 32): (3.98, 4.38),
    (100, 64): (5.58, 5.95),
    (100, 128): (4.53, 4.58),
}
_FINEST: Final = 1.26
"""Times as many in these with one level and groups of 16, whose turns are half as long (sm_90)."""

_QUAD8: Final = 1.5
"""More of them with the codebook quad8."""

_FOLD_PER_WEIGHT: Final = (6.0, 5.6)
"""Of the fold kernel: without a sidecar (estimate), and for each 16 ranks (counted, sm_90)."""


def speeds_of(gpu: Gpu) -> Speeds:
    """Those of a GPU, or of the nearest one known, as many multiprocessors as it has.

    Nearest by name, else by compute capability. AMD's and the interpreter's are taken for an A100.
    """
    known = next((speeds for name, speeds in GPUS.items() if name in gpu.name), None)
    if known is None:
        nearest = {86: "L40S", 89: "L40S", 90: "H100", 100: "B200", 103: "B200", 120: "L40S"}
        known = GPUS[nearest.get(gpu.capability, "A100")]
    share = gpu.processors / known.gpu.processors
    return replace(known, gpu=gpu, tensor=known.tensor * share, cache=known.cache * share)


def instructions_per_weight(
    capability: int, choice: Choice, group_size: int, row_scaled: bool, quad8: bool
) -> float:
    """Of the main loop, for each weight and block of tokens, by all threads together.

    Args:
        capability: of the GPU; 0 and other unknown ones are taken for 80.
        choice: decode or gemm.
        group_size: weights per scale.
        row_scaled: scales of two levels.
        quad8: codebook quad8 instead of int4.
    """
    target = {86: 89, 103: 100, 120: 89, 121: 89}.get(capability, capability)
    target = target if target in _FEW_TOKENS else 80
    block = max(choice.block_m, choice.block_n) if choice.block_n >= 128 else choice.block_m
    if block < 32:
        counted = _FEW_TOKENS[target][(64, 32, 16).index(group_size) + 3 * row_scaled]
    else:
        one, two = _MANY_TOKENS[target, min(block, 256 if target == 90 else 128)]
        counted = two if row_scaled else one * (_FINEST if group_size == 16 else 1)
    return counted + _QUAD8 * quad8


def predicted_time(
    speeds: Speeds, layer: Layer, choice: Choice, m: int, *, serialised: bool = False
) -> float:
    """Seconds of ``x W_hat^T``, the sidecar's first half included.

    Args:
        speeds: of the GPU.
        layer: the weight.
        choice: kernel and blocks.
        m: tokens.
        serialised: as these kernels were before ``tl.assume``, on sm_90.
    """
    if choice.kernel == "fold":
        return _fold_time(speeds, layer, m)
    side, body = layer.sidecar, _body(speeds, layer, choice, m, serialised)
    total = _LAUNCH + body + (_SPLIT if choice.split_k > 1 else 0)
    if side is None:
        return total
    # the sidecar's first half reads x once for 16 rows of V, in runs of 2048 columns at most
    passes = side.row_tiles * ceil_div(side.rank, 16)
    turns = ceil_div(min(2048, ceil_div(layer.k, side.column_tiles)), 2048 // side.bits)
    shrink = max(
        passes * m * layer.k * 2 / speeds.cache,
        side.bytes(0, layer.k) / speeds.memory / _MEMORY_SHARE,
        ceil_div(turns, 2) * _LATENCY,
    )
    if choice.pdl and choice.kernel == "decode":
        return max(total, _LAUNCH + shrink) + _BESIDE
    return total + _LAUNCH + shrink


def _body(speeds: Speeds, layer: Layer, choice: Choice, m: int, serialised: bool) -> float:
    """Seconds of the decode or gemm kernel between starting and ending."""
    gpu, processors = speeds.gpu, speeds.gpu.processors
    rows = ceil_div(layer.n, choice.block_n)
    blocks = ceil_div(m, choice.block_m)
    plane = plane_length(layer.k)
    width = ceil_div(layer.k, 4 * plane) * 4 * plane
    turns = ceil_div(width // (4 * choice.step), choice.split_k)
    programs = rows * blocks * choice.split_k
    busiest = ceil_div(programs, processors)
    resident = min(busiest, _resident(speeds, choice))
    weights = choice.block_n * 4 * choice.step  # of a turn
    # tensor cores; those of sm_100 take 128 rows, or half of their time is lost
    rate = speeds.tensor / processors / (2 if gpu.tensor_memory and choice.block_n < 128 else 1)
    kind = "joined" if choice.join else "planes" if gpu.asynchronous_products else "synchronous"
    waits = _WAITS["serialised" if serialised and gpu.capability == _SERIALISED else kind]
    turn = 2 * weights * choice.block_m / rate / _TENSOR_SHARE
    tensor = busiest * turns * (turn + waits * _WAIT / speeds.clock / resident)
    # issue slots: a warp alone does not fill those of its scheduler
    share = min(_ISSUE_SHARE, _WARP_SHARE * resident * choice.num_warps / _SCHEDULERS)
    count = instructions_per_weight(
        gpu.capability, choice, layer.group_size, layer.row_scaled, layer.quad8
    )
    issue = busiest * turns * weights * count / 32 / (_SCHEDULERS * speeds.clock * share)
    # memory: once, or for every block of tokens where the cache does not hold the weight
    side = layer.sidecar.bytes(layer.n, layer.k) if layer.sidecar else 0
    base = layer.base_bytes + side
    again = blocks if choice.kernel == "decode" and base > speeds.cache_bytes / 2 else 1
    ahead = (choice.num_stages - 1) * choice.block_n * choice.step * 2 * resident
    bandwidth = min(_MEMORY_SHARE * speeds.memory, min(processors, programs) * ahead / _LATENCY)
    memory = (base * again + 2 * m * (layer.k + layer.n)) / bandwidth
    # the cache: x for every block of rows, the weight for every block of tokens, partial sums
    sums = 8 * choice.split_k * m * rows * choice.block_n if choice.split_k > 1 else 0
    cached = rows * m * width * 2 + base * blocks + sums
    return max(tensor, issue, memory, cached / speeds.cache)


def _resident(speeds: Speeds, choice: Choice) -> int:
    """Programs that a multiprocessor holds at a time, by registers and shared memory."""
    columns = 4 * choice.step
    words, x = choice.block_n * choice.step * 2, columns * choice.block_m * 2
    shared = (choice.num_stages - 1) * words + choice.num_stages * x
    of_thread = 128 if choice.block_m < 32 else 168 if choice.block_n < 128 else 240
    registers = 32 * choice.num_warps * of_thread
    return max(1, min(speeds.shared // (shared + 2048), _REGISTERS // registers))


def _fold_time(speeds: Speeds, layer: Layer, m: int) -> float:
    """Seconds of writing the weight out, and of a dense product with it."""
    n, k, side = layer.n, layer.k, layer.sidecar
    base, ranks = _FOLD_PER_WEIGHT
    count = base + (ranks * ceil_div(side.rank, 16) if side else 0)
    slots = _SCHEDULERS * speeds.clock * _ISSUE_SHARE * speeds.gpu.processors
    extra = side.bytes(n, k) if side else 0
    written = max(
        (layer.base_bytes + extra + 2 * n * k) / speeds.memory / _MEMORY_SHARE,
        n * k * count / 32 / slots,
    )
    rows = rows_at_a_time(k, 2)
    whole, rest = divmod(n, rows)
    dense = whole * dense_time(speeds, rows, k, m) + (dense_time(speeds, rest, k, m) if rest else 0)
    return (whole + bool(rest)) * _LAUNCH + written + dense


@lru_cache(maxsize=1 << 16)
def dense_time(speeds: Speeds, n: int, k: int, m: int) -> float:
    """Seconds of cuBLAS's product of 16-bit matrices [m, k] and [n, k].

    The best of its usual tiles and splits of the columns, with whole waves of them; a cluster of
    two blocks shares what it reads from sm_90 on.
    """
    memory = 2 * (n * k + m * (n + k)) / speeds.memory / _MEMORY_SHARE
    rate = speeds.tensor / speeds.gpu.processors * _TENSOR_SHARE
    return min(
        _LAUNCH
        + (_SPLIT if split > 1 else 0)
        + max(memory, cache / speeds.cache, operations / rate)
        for split, cache, operations in _dense_ways(speeds.gpu, n, k, m)
    )


def _dense_ways(gpu: Gpu, n: int, k: int, m: int) -> Iterator[tuple[int, float, float]]:
    """Splits of columns, with bytes from the cache and operations of the busiest multiprocessor."""
    shared = 2 if gpu.capability >= 90 else 1
    for rows, tokens in _DENSE_TILES:
        for split in (1, 2, 4, 8):
            across, down = ceil_div(n, rows), ceil_div(m, tokens)
            read = (across * m + down * n) * k * 2 / shared
            sums = 8 * split * m * n if split > 1 else 0
            busiest = ceil_div(across * down * split, gpu.processors)
            yield split, read + sums, busiest * 2 * rows * tokens * k / split


def marlin_time(speeds: Speeds, n: int, k: int, m: int) -> float:
    """Seconds of Marlin's product, 4 bits with groups of 64, no sidecar: a roofline.

    All multiprocessors at work at any ``m``. It uses the instructions of sm_80, which reach 0.62 of
    the peak of newer GPUs' tensor cores (published measurements of Hopper).
    """
    rate = speeds.tensor * _TENSOR_SHARE * (_OLD_PRODUCTS if speeds.gpu.capability >= 90 else 1)
    memory = Layer(n, k).base_bytes + 2 * m * (n + k)
    products = 2 * ceil_div(m, 16) * 16 * n * k
    return _LAUNCH + max(memory / speeds.memory / _MEMORY_SHARE, products / rate)
