# SPDX-License-Identifier: Apache-2.0
"""What a quantisation tells while it runs, and what it did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from svsk_offline.printable import html_table
from svsk_offline.storage.layer_report import LayerReport, bits_per_weight

__all__ = ["Progress", "QuantizationResult"]


@dataclass
class Progress:
    """Callbacks of a run; the default ones do nothing.

    Attributes:
        message: gets what is to be known on the way.
        block: gets the number of blocks done, and that of all.
        skipped: likewise, before ``block``, if an earlier run did the last of them.
        layer: gets the figures of each quantised matrix.
    """

    message: Callable[[str], None] = lambda text: None
    block: Callable[[int, int], None] = lambda done, total: None
    skipped: Callable[[int, int], None] = lambda done, total: None
    layer: Callable[[LayerReport], None] = lambda report: None


@dataclass(frozen=True)
class QuantizationResult:
    """What a run did."""

    folder: Path
    layers: list[LayerReport]
    tables: list[LayerReport] = field(default_factory=list)  # embedding and output head
    block_seconds: list[float] = field(default_factory=list)
    plan_seconds: float = 0.0  # spent measuring gradients and error curves

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the blocks' quantised linears over their weights."""
        return bits_per_weight(self.layers)

    def _repr_html_(self) -> str:
        rows = [
            (
                one.name,
                f"{one.shape[0]} x {one.shape[1]}",
                f"{one.bits_per_weight:.3f}",
                "" if one.base_error is None else f"{one.base_error:.2e}",
                "" if one.error is None else f"{one.error:.2e}",
            )
            for one in (*self.layers, *self.tables)
        ]
        note = f"{self.folder}: {self.bits_per_weight:.4f} bits per weight in the blocks"
        return html_table(("matrix", "N x K", "bits", "base alone", "with sidecar"), rows, note)
