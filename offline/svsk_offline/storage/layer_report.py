# SPDX-License-Identifier: Apache-2.0
"""What the tool says of one quantised linear."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LayerReport", "bits_per_weight"]


@dataclass(frozen=True)
class LayerReport:
    """One line of the tool's output."""

    name: str
    shape: Sequence[int]  # N, K
    num_weights: int
    stored_bits: int
    base_error: float  # of the output without the sidecar, E|dW x|^2 / E|W x|^2
    error: float  # of the output, likewise
    held_out_tokens: int  # tokens both were measured on; 0: on those that were fitted
    sqnr_db: float
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.stored_bits / self.num_weights


def bits_per_weight(layers: Sequence[LayerReport]) -> float:
    """Stored bits of all layers over their weights."""
    return sum(layer.stored_bits for layer in layers) / sum(layer.num_weights for layer in layers)
