# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: capture once, replay as often as asked. Everything here needs a GPU."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

__all__ = ["capture", "capture_stream"]


@lru_cache(maxsize=8)
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one side stream on which this process captures.

    The kernels keep counters for a few streams only.
    """
    return torch.cuda.Stream(device)


def capture(
    device: torch.device, body: Callable[[], Any], pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run ``body`` once on a side stream, which compiles what it needs, then capture it.

    Args:
        device: of the tensors ``body`` works on.
        body: launches kernels on the current stream; must not wait for the device.
        pool: of ``torch.cuda.graph_pool_handle()``, to share memory with graphs that are never
            replayed at the same time and whose outputs are not kept; None for memory of its own.

    Returns:
        The graph, and what ``body`` returned while captured: its tensors hold the results of the
        latest replay.
    """
    stream, current = capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        body()
    current.wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = body()
    finally:
        torch.cuda.set_stream(current)  # torch leaves its own behind when a capture fails
    return graph, result
