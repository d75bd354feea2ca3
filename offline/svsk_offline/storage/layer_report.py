# SPDX-License-Identifier: Apache-2.0
"""What the tool says of one quantised linear."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from svsk_vllm.format.experts import ExpertName

__all__ = ["LayerReport", "bits_per_weight", "thin_experts"]


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

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.stored_bits / self.num_weights


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
