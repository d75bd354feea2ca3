# SPDX-License-Identifier: Apache-2.0
"""Times of kernels that are too short to time one by one.

Graphs of many launches over weights that leave the cache.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
from triton.errors import TritonError

from svsk_kernel_tools.bench.graphs import capture

__all__ = [
    "FAILURES",
    "Budget",
    "Call",
    "GpuTimer",
    "Sampler",
    "Stats",
    "Timer",
    "copies_needed",
    "launches_needed",
    "measure",
]

Name = TypeVar("Name")

Call = Callable[[], Any]
Sampler = Callable[[], float]
"""Replays once; microseconds per launch."""

FAILURES: Final = (RuntimeError, TritonError)
"""What a candidate raises that does not compile, or does not fit the GPU's memories."""

_GRAPH_US: Final = 2000.0
"""Time one replay should take: long against the error of events and the gap before a graph."""

_MOST_LAUNCHES: Final = 512
_MOST_COPIES: Final = 64
_WARM_ROUNDS: Final = 2


class Timer(Protocol):
    """Makes samplers; tests have one that needs no GPU."""

    l2_bytes: int
    copy_gbs: float  # device copy: bytes read and written, GB/s

    def sampler(self, calls: Sequence[Call], launches: int, pool: Any) -> Sampler:
        """A sampler of ``launches`` launches, taking turns among ``calls``."""

    def pool(self) -> Any:
        """Memory that samplers which never run at the same time may share."""


@dataclass(frozen=True)
class Stats:
    """Microseconds: median and quartiles of several replays."""

    us: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Stats":
        """Of at least two samples."""
        q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(statistics.median(samples), q1, q3)


class Budget:
    """Seconds that a run may take; None for any number."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def spent(self) -> bool:
        """Whether nothing new should be begun."""
        return self._end is not None and self._clock() >= self._end


class GpuTimer:
    """Times by CUDA events around the replay of a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        self.copy_gbs = self._copy_gbs()

    def pool(self) -> Any:
        """A new pool of graph memory."""
        return torch.cuda.graph_pool_handle()

    def sampler(self, calls: Sequence[Call], launches: int, pool: Any = None) -> Sampler:
        """See :class:`Timer`.

        Every one of ``calls`` must launch the same kernels, on tensors of its own.
        """
        calls[0]()  # compiles

        def body() -> None:
            for number in range(launches):
                calls[number % len(calls)]()

        graph, _ = capture(self.device, body, pool)
        return self._timed(graph.replay, launches)

    def _timed(self, run: Call, launches: int) -> Sampler:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def sample() -> float:
            start.record()
            run()
            end.record()
            end.synchronize()
            milliseconds: float = start.elapsed_time(end)
            return milliseconds * 1000 / launches

        return sample

    def _copy_gbs(self) -> float:
        """Bandwidth of a copy far larger than the cache."""
        size = max(1 << 28, 8 * self.l2_bytes)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        sample = self._timed(lambda: target.copy_(source), 1)
        return 2 * size / measure({"copy": sample}, 11)["copy"].us / 1000


def copies_needed(weight_bytes: int, l2_bytes: int) -> int:
    """Copies of a weight whose bytes together exceed twice the second-level cache, at least 2."""
    return min(_MOST_COPIES, max(2, 2 * l2_bytes // weight_bytes + 1))


def launches_needed(bytes_moved: int, flops: float, copies: int) -> int:
    """Launches in a graph.

    All copies equally often, and long enough to time, from a rough idea of the GPU.
    """
    guess = max(bytes_moved / 2e6, flops / 3e8, 2.0)  # microseconds at 2 TB/s and 300 TFLOP/s
    rounds = math.ceil(min(_GRAPH_US / guess, _MOST_LAUNCHES) / copies)
    return rounds * copies


def measure(samplers: Mapping[Name, Sampler], rounds: int) -> dict[Name, Stats]:
    """Statistics of every sampler.

    Each round runs all of them in turn, so that all see the same clocks and heat.
    """
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    for number in range(_WARM_ROUNDS + rounds):
        for name, sampler in samplers.items():
            value = sampler()
            if number >= _WARM_ROUNDS:
                samples[name].append(value)
    return {name: Stats.of(found) for name, found in samples.items()}
