# SPDX-License-Identifier: Apache-2.0
"""Finding the best blocks for the GPU at hand, and writing them where the dispatch looks."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import triton

from svsk_kernel_tools.bench.correctness import relative_error
from svsk_kernel_tools.bench.errors import BenchError
from svsk_kernel_tools.bench.layers import BenchLayer
from svsk_kernel_tools.bench.shapes import GROUP_SIZE, VARIANTS, Shape, bytes_needed
from svsk_kernel_tools.bench.timing import FAILURES, Sampler, Timer, launches_needed, measure
from svsk_kernels.gpu import folded_product, launch
from svsk_kernels.gpu.choice import Choice, Gpu, choice_for
from svsk_kernels.gpu.repack_base import plane_length
from svsk_kernels.gpu.rule import MAX_SPLIT_K, candidates, heuristic_choices
from svsk_kernels.gpu.tuning import Entry, TuningTable, choices_for, load_table, table_name
from svsk_offline.storage.atomic import write_text

__all__ = [
    "BUCKETS",
    "bucket_key",
    "refined",
    "select",
    "time_bucket",
    "tokens_of",
    "trial_choices",
    "write_table",
]

BUCKETS: Final = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, None)
"""Limits of the numbers of tokens that get a choice of their own."""

_LAST_TOKENS: Final = 4096
_TENSOR_MEMORY: Final = range(100, 120)  # capabilities where a block of 128 tokens does not fit
_BOUND: Final = 1e-2
_FINALISTS: Final = 2


def tokens_of(bucket: int | None) -> int:
    """Tokens with which a bucket is timed: its most, or 4096."""
    return _LAST_TOKENS if bucket is None else bucket


def bucket_key(shape: Shape, bucket: int | None) -> str:
    """Name of the results of one shape and bucket."""
    return f"tune/{shape.name}/{bucket or 'more'}"


def trial_choices(gpu: Gpu, n: int, k: int, group_size: int, m: int) -> list[Choice]:
    """What is tried first for ``m`` tokens.

    Blocks, steps, warps and stages; columns split as the rule says.
    """
    rule = replace(choice_for(heuristic_choices(gpu, n, k, group_size), m), max_m=None)
    split = rule.split_k if rule.kernel == "decode" else 1
    choices = [rule]
    choices += [
        choice
        for choice in candidates(gpu, n, k, group_size)
        if _applies(choice.kernel, m)
        and (
            choice.kernel != "decode" or (choice.block_m >= min(64, m) and choice.split_k == split)
        )
    ]
    plane = plane_length(k)
    steps = sorted({min(plane, group_size, step) for step in (64, 32)})
    if _applies("decode", m):
        common: dict[str, Any] = {
            "kernel": "decode",
            "split_k": split,
            "pdl": gpu.dependent_launch,
        }
        choices += [
            Choice(
                **common,
                block_m=min(64, m),
                block_n=rows,
                step=step,
                num_warps=warps,
                num_stages=stages,
            )
            for rows in (32, 64, 128)
            for step in steps
            for warps, stages in ((4, 2), (4, 4), (8, 3))
        ]
    if _applies("gemm", m):
        choices += [
            Choice(
                kernel="gemm",
                block_m=tokens,
                block_n=rows,
                step=steps[0],
                num_warps=warps,
                num_stages=stages,
                join=gpu.asynchronous_products,
            )
            for tokens in ((64,) if gpu.capability in _TENSOR_MEMORY else (64, 128, 256))
            for rows in (64, 128)
            for warps in (4, 8)
            for stages in (2, 3, 4)
            if tokens * rows <= warps * 2048  # more spills registers
        ]
    return list(dict.fromkeys(choices))


def refined(choices: Iterable[Choice], k: int, gpu: Gpu) -> list[Choice]:
    """The same decode blocks with other splits of columns, with and without dependent launch."""
    trials = []
    for choice in choices:
        steps = -(-k // (4 * plane_length(k))) * (plane_length(k) // choice.step)
        splits = [split for split in (1, 2, 4, 8) if split <= min(MAX_SPLIT_K, max(1, steps // 2))]
        changes: list[dict[str, Any]] = [{"split_k": split} for split in (*splits, choice.split_k)]
        changes += [{"pdl": not choice.pdl}] if gpu.dependent_launch else []
        trials += [replace(choice, **change) for change in changes]
    return list(dict.fromkeys(trials))


def _applies(kernel: str, m: int) -> bool:
    """Whether a kernel could be the best for ``m`` tokens."""
    low, high = {"decode": (1, 1024), "gemm": (64, 2048), "fold": (256, math.inf)}[kernel]
    return low <= m <= high


def time_bucket(
    shape: Shape, layers: list[BenchLayer], gpu: Gpu, bucket: int | None, timer: Timer, rounds: int
) -> list[dict[str, Any]]:
    """Time all choices for one shape and bucket.

    What fails, spills or computes something else is not timed.

    Returns:
        One record a choice, see :mod:`svsk_kernel_tools.bench.report`.
    """
    m = tokens_of(bucket)
    generator = torch.Generator(layers[0].tensors["words"].device).manual_seed(m)
    x = torch.randn(m, shape.k, generator=generator, device=generator.device).to(
        layers[0].matmul.spec.dtype
    )
    expected = layers[0].run(x, Choice(kernel="fold"))
    tried: dict[Choice, dict[str, Any]] = {}

    def run(choices: Iterable[Choice]) -> None:
        samplers: dict[Choice, Sampler] = {}
        pool = timer.pool()
        for choice in choices:
            if choice in tried:
                continue
            tried[choice] = record = _record(shape, bucket, choice)
            sampler = _prepared(layers, x, choice, expected, timer, pool)
            if isinstance(sampler, str):
                record["error"] = sampler
            else:
                samplers[choice] = sampler
        for choice, stats in measure(samplers, rounds).items():
            tried[choice] |= asdict(stats)

    run(trial_choices(gpu, shape.n, shape.k, GROUP_SIZE, m))
    decode = sorted(
        (record["us"], i, choice)
        for i, (choice, record) in enumerate(tried.items())
        if choice.kernel == "decode" and "us" in record
    )
    run(refined((choice for *_, choice in decode[:_FINALISTS]), shape.k, gpu))
    return list(tried.values())


def _record(shape: Shape, bucket: int | None, choice: Choice) -> dict[str, Any]:
    return {
        "kind": "tune",
        "group": bucket_key(shape, bucket),
        "shape": shape.name,
        "n": shape.n,
        "k": shape.k,
        "m": tokens_of(bucket),
        "max_m": bucket,
        "choice": choice.blocks,
    }


def _prepared(
    layers: list[BenchLayer],
    x: torch.Tensor,
    choice: Choice,
    expected: torch.Tensor,
    timer: Timer,
    pool: Any,
) -> Sampler | str:
    """A sampler of one choice, or why it is left out."""
    try:
        with _spills(choice.kernel) as spills:
            y = layers[0].run(x, choice)
        error = relative_error(y, expected)
        if not error < _BOUND:
            return f"relative error {error:.1e}, expected less than {_BOUND}"
        if sum(spills):
            return f"{sum(spills)} registers spilled"
        needed = bytes_needed(
            Shape("", layers[0].spec.n, layers[0].spec.k), VARIANTS[0], x.shape[0]
        )
        flops = 2.0 * x.shape[0] * layers[0].spec.n * layers[0].spec.k
        calls = [partial(layer.run, x, choice) for layer in layers]
        return timer.sampler(calls, launches_needed(needed, flops, len(calls)), pool)
    except FAILURES as failure:
        return f"{type(failure).__name__}: {failure}"[:300]


class _Recorder:
    """Stands for a Triton kernel, and notes how much every launched version spills."""

    def __init__(self, kernel: Any, spills: list[int]) -> None:
        self._kernel, self._spills = kernel, spills

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            compiled = self._kernel[grid](*args, **options)
            self._spills.append(getattr(compiled, "n_spills", 0) or 0)
            return compiled

        return run


@contextmanager
def _spills(kernel: str) -> Iterator[list[int]]:
    """Spills of the versions of a kernel that are launched inside."""
    name, spills = f"{kernel}_kernel", list[int]()
    module = folded_product if kernel == "fold" else launch
    original = getattr(module, name)
    setattr(module, name, _Recorder(original, spills))
    try:
        yield spills
    finally:
        setattr(module, name, original)


def select(results: Mapping[int | None, Mapping[Choice, float]]) -> tuple[Choice, ...]:
    """The best choice of every bucket, from microseconds by bucket and choice.

    Without results a bucket joins the next.

    Raises:
        BenchError: there are no results.
    """
    timed = {bucket: times for bucket in BUCKETS if (times := results.get(bucket))}
    if not timed:
        raise BenchError(
            "Nothing could be timed: every choice failed. The errors are in the JSON report."
        )
    found: list[Choice] = []
    for bucket, times in timed.items():
        best = replace(min(times, key=times.__getitem__), max_m=bucket)
        if found and replace(found[-1], max_m=bucket) == best:
            found.pop()
        found.append(best)
    if found[-1].max_m is not None:
        found.append(Choice(kernel="fold"))
    return tuple(found)


def write_table(folder: Path, device: str, entries: Iterable[Entry]) -> Path:
    """Write a GPU's table, keeping entries of other shapes.

    Args:
        folder: ``configs`` of this package, or another to be copied there.
        device: name of the GPU.
        entries: new ones; they replace those of the same shape, group size and levels of scales.

    Returns:
        The file.
    """
    path = folder / table_name(device)
    merged: dict[tuple[int, int, int, bool], Entry] = {}
    earlier = (
        TuningTable.from_json(path.read_text(encoding="utf-8")).entries if path.is_file() else ()
    )
    for entry in (*earlier, *entries):
        merged[entry.n, entry.k, entry.group_size, entry.row_scaled] = entry
    table = TuningTable(device=device, triton=triton.__version__, entries=tuple(merged.values()))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, table.to_json())
    load_table.cache_clear()
    choices_for.cache_clear()
    return path
