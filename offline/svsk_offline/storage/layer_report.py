# SPDX-License-Identifier: Apache-2.0
"""What the tool says of one quantised linear."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from svsk_vllm.format.errors import SvskFormatError
from svsk_vllm.format.experts import ExpertName
from svsk_vllm.format.files import read_json

__all__ = [
    "REPORT_NAME",
    "LayerReport",
    "bits_per_weight",
    "report_json",
    "stored_errors",
    "thin_experts",
]

REPORT_NAME: Final = "svsk-report.json"
"""In a checkpoint's folder: what the run measured of each matrix. No reader needs it."""


@dataclass(frozen=True)
class LayerReport:
    """One line of the tool's output."""

    name: str
    shape: Sequence[int]  # N, K
    num_weights: int
    stored_bits: int
    base_error: float | None  # of the output without the sidecar, E|dW x|^2 / E|W x|^2
    error: float | None  # of the output, likewise; None: an expert that no measured token reached
    held_out_tokens: int  # tokens both were measured on; 0: on those that were fitted
    sqnr_db: float
    seconds: float
    routed_tokens: int | None = None  # fitted tokens that were routed to an expert
    aim_share: float | None = None  # of the correction for errors before it; None: not asked for

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.stored_bits / self.num_weights


def report_json(layers: Sequence[LayerReport]) -> dict[str, Any]:
    """What is kept of all matrices, the same whenever the same is quantised."""
    rows = {
        layer.name: {
            "base_error": layer.base_error,
            "error": layer.error,
            "held_out_tokens": layer.held_out_tokens,
            "sqnr_db": layer.sqnr_db,
        }
        | ({} if layer.aim_share is None else {"aim_share": layer.aim_share})
        for layer in layers
    }
    return {"matrices": rows}


def stored_errors(folder: Path) -> dict[str, dict[str, float]]:
    """What a checkpoint's run measured, by the name of each matrix; empty where nothing is kept.

    Experts that no measured token reached have no errors, and are left out.

    Raises:
        SvskFormatError: the file is there and is damaged.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return {}
    rows = read_json(path).get("matrices")
    keys = ("base_error", "error", "held_out_tokens", "sqnr_db")
    if not isinstance(rows, Mapping):
        raise SvskFormatError(f"{path}: has no matrices. Remove it, or quantise again.")
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if isinstance(row, Mapping) and None in (row.get("error", 0), row.get("base_error", 0)):
            continue
        values = [row.get(key) if isinstance(row, Mapping) else None for key in keys]
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
            raise SvskFormatError(
                f"{path}: {name!r} lacks a number of {', '.join(keys)}. Remove the file, or"
                " quantise again."
            )
        found[str(name)] = {key: float(row[key]) for key in keys}
    return found


def bits_per_weight(layers: Sequence[LayerReport]) -> float:
    """Stored bits of all layers over their weights."""
    return sum(layer.stored_bits for layer in layers) / sum(layer.num_weights for layer in layers)


def thin_experts(layers: Iterable[LayerReport]) -> list[str]:
    """Experts with fewer routed tokens than one of their matrices has inputs, a line per layer.

    What was missing came from the other experts' tokens
    (:mod:`svsk_offline.calibration.expert_tokens`).
    """
    found: dict[str, dict[int, int]] = {}
    for layer in layers:
        tokens, name = layer.routed_tokens, ExpertName.of(layer.name)
        if name is not None and tokens is not None and tokens < layer.shape[1]:
            found.setdefault(name.layer, {})[name.number] = tokens
    return [
        f"{layer}: " + ", ".join(f"{number} ({tokens})" for number, tokens in sorted(thin.items()))
        for layer, thin in found.items()
    ]
