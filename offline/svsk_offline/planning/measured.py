# SPDX-License-Identifier: Apache-2.0
"""What a sweep of the loss's gradient found of the linears, and the file that keeps it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from svsk_offline.planning.error_curves import ErrorCurve
from svsk_offline.quantizers.row_metric import RowMetric
from svsk_offline.storage.atomic import write_tensors
from svsk_vllm.format import ShardedReader, SvskFormatError

__all__ = ["Measurements", "metric_tensors", "stored_metrics"]


@dataclass(frozen=True)
class Measurements:
    """What a sweep found, by full name of the linear.

    Attributes:
        rows: float32 [N], ``E_t[g_tn^2]``, the mean squared gradient of each output feature.
        tokens: float32 [samples, tokens], ``|g_t|^2``; empty where that was not asked for.
        curves: how each matrix's loss falls; empty without a bit budget.
        metrics: how much errors of its output features count together; empty where no directions
            were asked for.
    """

    rows: Mapping[str, torch.Tensor]
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    curves: Mapping[str, ErrorCurve] = field(default_factory=dict)
    metrics: dict[str, RowMetric] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Iterable["Measurements"]) -> "Measurements":
        """What was found of several blocks."""
        names = [part.name for part in fields(cls)]
        found: dict[str, dict[str, Any]] = {name: {} for name in names}
        for part in parts:
            for name in names:
                found[name] |= getattr(part, name)
        return cls(**found)

    def save(self, path: Path, key: str) -> None:
        """Write them to a safetensors file, atomically, with the key of what they depend on."""
        tensors = {f"{name}:rows": tensor for name, tensor in self.rows.items()}
        tensors |= {f"{name}:tokens": tensor for name, tensor in self.tokens.items()}
        tensors |= {f"{name}:shares": curve.shares for name, curve in self.curves.items()}
        tensors |= metric_tensors(self.metrics)
        curves = {
            name: [curve.loss, [[*base, ratio] for base, ratio in curve.ratios.items()]]
            for name, curve in self.curves.items()
        }
        write_tensors(path, tensors, {"key": key, "curves": json.dumps(curves)})

    @classmethod
    def load(cls, path: Path, key: str) -> "Measurements":
        """Read what :meth:`save` wrote.

        Raises:
            SvskFormatError: the file is damaged, or of another key.
        """
        reader = ShardedReader(path.parent, shards=[path.name])
        metadata = reader.metadata(path.name)
        if metadata.get("key") != key:
            raise SvskFormatError(f"{path}: its name is not that of what it holds.")
        found: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "tokens": {}, "shares": {}}
        metrics: dict[str, torch.Tensor] = {}
        for stored in reader.names:
            name, _, kind = stored.rpartition(":")
            if kind in found:
                found[kind][name] = reader.read(stored)
            else:
                metrics[stored] = reader.read(stored)
        curves = {
            name: ErrorCurve(
                loss, {(size, bits): r for size, bits, r in ratios}, found["shares"][name]
            )
            for name, (loss, ratios) in json.loads(metadata["curves"]).items()
        }
        return cls(found["rows"], found["tokens"], curves, stored_metrics(metrics))


def metric_tensors(metrics: Mapping[str, RowMetric]) -> dict[str, torch.Tensor]:
    """What is stored of metrics, by names that :func:`stored_metrics` takes apart."""
    tensors = {f"{name}:own": metric.own for name, metric in metrics.items()}
    return tensors | {f"{name}:directions": metric.directions for name, metric in metrics.items()}


def stored_metrics(tensors: Mapping[str, torch.Tensor]) -> dict[str, RowMetric]:
    """Metrics by the names of linears, from :func:`metric_tensors`."""
    names = (key.rpartition(":")[0] for key in tensors if key.endswith(":own"))
    return {
        name: RowMetric(tensors[f"{name}:own"], tensors[f"{name}:directions"]) for name in names
    }
