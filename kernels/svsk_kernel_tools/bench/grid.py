# SPDX-License-Identifier: Apache-2.0
"""The grid of timings: for each layer and number of tokens all candidates, timed in turns."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F

from svsk_kernel_tools.bench.cases import forced_choice
from svsk_kernel_tools.bench.layers import BenchLayer, layer_of_shape
from svsk_kernel_tools.bench.shapes import (
    GROUP_SIZE,
    VARIANTS,
    Shape,
    Variant,
    bytes_dense,
    bytes_needed,
)
from svsk_kernel_tools.bench.split import SplitLayer
from svsk_kernel_tools.bench.timing import (
    FAILURES,
    Call,
    Timer,
    copies_needed,
    launches_needed,
    measure,
)
from svsk_kernels.gpu.choice import Choice, choice_for
from svsk_kernels.gpu.matmul_op import gpu_of
from svsk_kernels.gpu.tuning import choices_for

__all__ = ["Candidate", "Weights", "group_key", "kernels_for", "load_weights", "time_group"]

_DTYPE: Final = torch.bfloat16


@dataclass(frozen=True)
class Weights:
    """One shape in every form, each in as many copies as leave the cache."""

    shape: Shape
    layers: dict[Variant, list[BenchLayer]]
    split: dict[Variant, list[SplitLayer]]
    dense: list[torch.Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """One thing to time."""

    variant: Variant | None  # None: the 16-bit weight
    kernel: str  # decode, gemm, fold, split or cublas
    choice: Choice | None
    dispatched: bool
    calls: Sequence[Call]
    bytes: int

    @property
    def label(self) -> str:
        """Name, unique within a group."""
        return f"{self.variant.label if self.variant else 'bf16'} {self.kernel}"


def load_weights(shape: Shape, device: torch.device, timer: Timer, make_split: bool) -> Weights:
    """Make the weights of a shape; ``make_split`` also for vLLM's kernel."""
    layers, split, notes = {}, {}, []
    for variant in VARIANTS:
        first = layer_of_shape(shape, variant, _DTYPE, device)
        copies = copies_needed(bytes_needed(shape, variant, 0), timer.l2_bytes)
        if make_split and variant.codebook == "int4":
            made = SplitLayer.checked(first)
            if isinstance(made, str):
                notes.append(f"{shape.name} {variant.label}: split left out: {made}")
            else:
                split[variant] = [made, *(made.copy() for _ in range(copies - 1))]
        layers[variant] = first.copies(copies)
    generator = torch.Generator(device).manual_seed(shape.n)
    dense = [
        torch.randn(shape.n, shape.k, generator=generator, device=device).mul_(0.02).to(_DTYPE)
        for _ in range(copies_needed(bytes_dense(shape, 0), timer.l2_bytes))
    ]
    return Weights(shape, layers, split, dense, tuple(notes))


def kernels_for(m: int, dispatched: str) -> list[str]:
    """Kernels worth timing at ``m`` tokens: the dispatched one first, then its neighbours."""
    forced = [
        name
        for name, low, high in (("decode", 1, 128), ("gemm", 16, 2048), ("fold", 128, 1 << 30))
        if low <= m <= high
    ]
    return [dispatched, *(name for name in forced if name != dispatched)]


def group_key(shape: Shape, m: int) -> str:
    """Name of the timings of one shape and number of tokens."""
    return f"time/{shape.name}/{m}"


def time_group(weights: Weights, m: int, timer: Timer, rounds: int) -> list[dict[str, Any]]:
    """Time every candidate for one shape and ``m`` tokens.

    Returns:
        One record a candidate, see :mod:`svsk_kernel_tools.bench.report`. What did not run has
        ``error`` and no time.
    """
    shape, device = weights.shape, weights.dense[0].device
    x = torch.randn(m, shape.k, device=device, generator=torch.Generator(device).manual_seed(m)).to(
        _DTYPE
    )
    found, samplers, pool = {}, {}, timer.pool()
    for candidate in _candidates(weights, x):
        launches = launches_needed(
            candidate.bytes, 2.0 * m * shape.n * shape.k, len(candidate.calls)
        )
        record = _record(shape, m, candidate, launches)
        found[candidate.label] = record
        try:
            samplers[candidate.label] = timer.sampler(candidate.calls, launches, pool)
        except FAILURES as error:
            record["error"] = f"{type(error).__name__}: {error}"[:300]
    for label, stats in measure(samplers, rounds).items():
        record = found[label]
        gbs = record["bytes"] / stats.us / 1000
        record |= asdict(stats) | {"gbs": gbs, "of_copy": gbs / timer.copy_gbs}
    records = list(found.values())
    _add_ratios(records)
    return records


def _record(shape: Shape, m: int, candidate: Candidate, launches: int) -> dict[str, Any]:
    variant, choice = candidate.variant, candidate.choice
    return {
        "kind": "time",
        "group": group_key(shape, m),
        "shape": shape.name,
        "n": shape.n,
        "k": shape.k,
        "m": m,
        "variant": variant.label if variant else "bf16",
        "kernel": candidate.kernel,
        "dispatched": candidate.dispatched,
        "choice": choice.blocks if choice else None,
        "bytes": candidate.bytes,
        "copies": len(candidate.calls),
        "launches": launches,
    }


def _candidates(weights: Weights, x: torch.Tensor) -> Iterator[Candidate]:
    shape, m = weights.shape, x.shape[0]
    gpu, size = gpu_of(x.device), (shape.n, shape.k, GROUP_SIZE)
    usual = choice_for(choices_for(gpu, *size), m)
    calls: list[Call] = [partial(F.linear, x, weight) for weight in weights.dense]
    yield Candidate(None, "cublas", None, False, calls, bytes_dense(shape, m))
    for variant, layers in weights.layers.items():
        needed = bytes_needed(shape, variant, m)
        for kernel in kernels_for(m, usual.kernel):
            chosen = usual if kernel == usual.kernel else forced_choice(kernel, gpu, *size, m)
            calls = [partial(layer.run, x, chosen) for layer in layers]
            yield Candidate(variant, kernel, chosen, chosen is usual, calls, needed)
        if variant in weights.split:
            calls = [partial(layer.run, x) for layer in weights.split[variant]]
            yield Candidate(variant, "split", None, False, calls, needed)


def _add_ratios(records: list[dict[str, Any]]) -> None:
    """Ratios within a group.

    How many times faster than cuBLAS and than split; what the sidecar adds to the base.
    """
    us = {
        (record["variant"], record["kernel"]): record["us"] for record in records if "us" in record
    }
    usual = {
        record["variant"]: record["us"]
        for record in records
        if "us" in record and record["dispatched"]
    }
    for record in records:
        if "us" not in record or record["kernel"] == "cublas":
            continue
        for name, other in (
            ("cublas", ("bf16", "cublas")),
            ("split", (record["variant"], "split")),
        ):
            if other in us:
                record[f"over_{name}"] = us[other] / record["us"]
        if record["dispatched"] and "int4-r0" in usual:
            record["sidecar_overhead"] = record["us"] / usual["int4-r0"] - 1
