# SPDX-License-Identifier: Apache-2.0
"""The kernels and blocks for a layer's tokens where nothing was measured, by predicted time."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from svsk_kernels.gpu.choice import Choice, Gpu, longest_step
from svsk_kernels.gpu.counters import COUNTERS
from svsk_kernels.gpu.predicted_time import Layer, Speeds, predicted_time, speeds_of
from svsk_kernels.gpu.repack_base import plane_length
from svsk_kernels.tile_grid import ceil_div

__all__ = [
    "MAX_SPLIT_K",
    "candidates",
    "heuristic_choices",
    "invariant_choices",
    "least_time",
]

MAX_SPLIT_K: Final = 8
"""More splits cost more in partial sums than they bring in parallelism."""

_LIMITS: Final = (
    *(16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1536, 2048, 4096),
    None,
)
"""Numbers of tokens up to which a choice may go: those of whole blocks. Fewer limits make fewer
choices, each of which is compiled when a model is loaded."""

_MANY: Final = 8192
"""Tokens that stand for more than the last limit."""

_CHANGE: Final = 0.04
"""Share of the time of a range of tokens that a change of kernels has to save."""


def heuristic_choices(
    gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool = False
) -> tuple[Choice, ...]:
    """Choices where nothing was measured: those of the least predicted time.

    Base alone: the rule does not know of the sidecar, which changes little, nor of the codebook, so
    that either counts for half. Columns
    are split where programs are few, in as many parts as suit the number of tokens (not on AMD,
    where nobody has checked that the partial sums are seen in time).

    Args:
        gpu: the GPU.
        n: rows N.
        k: columns K.
        group_size: weights per scale.
        row_scaled: scales of two levels.
    """
    layer, speeds = Layer(n, k, group_size, row_scaled), speeds_of(gpu)
    known = candidates(gpu, n, k, group_size, row_scaled)
    # the cheapest way through all ranges of tokens, where a change of kernels costs too
    costs = [0.0] * len(known)
    ways: list[list[int]] = []
    first = 1
    for limit in _LIMITS:
        last = _MANY if limit is None else limit
        ends = (first, last)
        here = [
            sum(math.log(predicted_time(speeds, *case)) / 4 for case in _both(layer, choice, ends))
            if _takes(choice, n, last) and (limit is not None or choice.split_k == 1)
            else math.inf
            for choice in known
        ]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        change = costs[cheapest] + _CHANGE
        ways.append([i if cost <= change else cheapest for i, cost in enumerate(costs)])
        costs = [min(cost, change) + own for cost, own in zip(costs, here, strict=True)]
        first = last + 1
    at = min(range(len(costs)), key=costs.__getitem__)
    found: list[Choice] = []
    for limit, before in zip(reversed(_LIMITS), reversed(ways), strict=True):
        if not found or replace(found[-1], max_m=None) != known[at]:
            found.append(replace(known[at], max_m=limit))
        at = before[at]
    return tuple(reversed(found))


def invariant_choices(
    gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool = False
) -> tuple[Choice, ...]:
    """The one choice for any number of tokens, so that none decides a row's bits.

    Decode in blocks of 64 tokens, its columns split as suits 64: of those that read the weight once
    for few tokens, it reads it least often for many. Nothing is measured.
    """
    layer, speeds = Layer(n, k, group_size, row_scaled), speeds_of(gpu)
    known = candidates(gpu, n, k, group_size, row_scaled)
    blocks = [choice for choice in known if choice.kernel == "decode" and choice.block_m == 64]
    many = [choice for choice in blocks if choice.block_n == 64]
    return (min(many, key=lambda choice: predicted_time(speeds, layer, choice, 64)),)


def _both(
    layer: Layer, choice: Choice, tokens: Sequence[int]
) -> Iterator[tuple[Layer, Choice, int]]:
    """A choice for these numbers of tokens, with either codebook."""
    for quad8, m in itertools.product((False, True), tokens):
        yield replace(layer, quad8=quad8), choice, m


def _takes(choice: Choice, n: int, m: int) -> bool:
    """Whether a choice may be given up to ``m`` tokens."""
    if choice.kernel != "decode":
        return m > 64
    if m <= 16 or choice.block_m < 64:  # more blocks than one would read the weight again
        return m <= choice.block_m and (m > 16 or choice.block_m == 16)
    return choice.split_k == 1 or _blocks(choice, n, m) <= COUNTERS


def _blocks(choice: Choice, n: int, m: int) -> int:
    """Blocks of the result, each of which has a counter where columns are split."""
    return ceil_div(n, choice.block_n) * ceil_div(m, choice.block_m)


def candidates(gpu: Gpu, n: int, k: int, group_size: int, row_scaled: bool = False) -> list[Choice]:
    """What the kernels compile to without spilling, and within shared memory.

    A step of 32 words keeps the activations of 64 and more tokens in shared memory. On sm_90 that
    of 128 rows is twice as long, for half as many waits, with one turn fewer ahead.
    """
    hopper = gpu.asynchronous_products and not gpu.tensor_memory
    long = longest_step(k, group_size, row_scaled)
    short = min(long, 32)
    pdl = gpu.dependent_launch
    # With 128 tokens Triton 3.6 asks for 544 of sm_100's 512 columns of tensor memory, and then
    # drops the code.
    tokens = 64 if gpu.tensor_memory else 128
    stages = 3 if gpu.shared_memory > 128 * 1024 else 2
    large: dict[str, Any] = {
        "block_m": tokens,
        "block_n": 128,
        "step": long if hopper else short,
        "num_warps": 8,
        "num_stages": 2 if hopper and long > 32 else stages,
        "join": gpu.asynchronous_products,
    }
    decode = [
        Choice(kernel="decode", block_m=16, step=long, pdl=pdl),
        Choice(kernel="decode", block_m=32, step=long, pdl=pdl),
        Choice(kernel="decode", block_m=64, step=short, pdl=pdl),
        Choice(kernel="decode", pdl=pdl, **large),
    ]
    if hopper:
        # x, of 16 bits, is read once per block of rows, the weight, of 4, once per block of tokens:
        # many rows save more bytes of the cache than many tokens
        tall = large | {"block_n": 256, "step": short, "num_stages": stages}
        decode += [Choice(kernel="decode", pdl=pdl, **tall | {"block_m": m}) for m in (64, 128)]
    split = [
        replace(choice, split_k=parts)
        for choice in decode
        for parts in _splits(k, choice.step, gpu.capability > 0)
    ]
    return [*split, Choice(kernel="gemm", **large), Choice(kernel="fold")]


def _splits(k: int, step: int, may_split: bool) -> Sequence[int]:
    """Numbers of parts of the columns, none of which is empty and each of which has two turns."""
    plane = plane_length(k)
    turns = ceil_div(k, 4 * plane) * (plane // step)
    most = max(1, min(turns // 2, MAX_SPLIT_K)) if may_split else 1
    return sorted({ceil_div(turns, ceil_div(turns, parts)) for parts in range(1, most + 1)})


def least_time(speeds: Speeds, layer: Layer, m: int) -> float:
    """Seconds of a layer's product with the choice of the least predicted time for ``m`` tokens.

    Args:
        speeds: of the GPU.
        layer: the weight.
        m: tokens.
    """
    known = candidates(speeds.gpu, layer.n, layer.k, layer.group_size, layer.row_scaled)
    return min(
        predicted_time(speeds, layer, choice, m) for choice in known if _takes(choice, layer.n, m)
    )
