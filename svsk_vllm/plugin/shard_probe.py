# SPDX-License-Identifier: Apache-2.0
"""Which rows and columns of the checkpoint a vLLM layer holds.

Its own loader is asked with ``arange`` probes.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.parameter import ChannelQuantScaleParameter, RowvLLMParameter

__all__ = ["Loader", "ShardId", "probe_columns", "probe_rows"]

ShardId = str | int | tuple[int, ...] | None
"""vLLM's name of a part of a fused layer, a tuple where one tensor fills several; None for all."""

Loader = Callable[..., Any]


def probe_rows(
    loader: Callable[..., Any], source_rows: int, rows: int, tp: tuple[int, int], shard: ShardId
) -> torch.Tensor:
    """Checkpoint row of each row of the layer that ``shard`` fills.

    Args:
        loader: the layer's own weight loader.
        source_rows: at least as many rows as the checkpoint tensor has.
        rows: rows of the layer.
        tp: the layer's tensor-parallel rank and size.
        shard: vLLM's shard id, None for an unfused layer.

    Returns:
        int64 [rows], -1 where another shard's rows are.
    """
    data = torch.full((rows,), -1, dtype=torch.int64, device="cpu")
    parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    return _probe(loader, parameter, source_rows, tp, shard)


def probe_columns(
    loader: Callable[..., Any],
    source_columns: int,
    columns: int,
    tp: tuple[int, int],
    shard: ShardId,
) -> torch.Tensor:
    """Checkpoint column of each column of the layer, int64 [columns].

    Arguments as in :func:`probe_rows`.
    """
    data = torch.full((columns,), -1, dtype=torch.int64, device="cpu")
    parameter = RowvLLMParameter(data=data, input_dim=0, weight_loader=loader)
    return _probe(loader, parameter, source_columns, tp, shard)


def _probe(
    loader: Loader, parameter: Any, size: int, tp: tuple[int, int], shard: ShardId
) -> torch.Tensor:
    parameter.tp_rank, parameter.tp_size = tp
    arguments = () if shard is None else (shard,)
    loader(parameter, torch.arange(size, device="cpu"), *arguments)
    probed: torch.Tensor = parameter.data
    return probed
