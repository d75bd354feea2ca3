# SPDX-License-Identifier: Apache-2.0
"""How far apart the channels of a layer's keys are, which caches of few bits suffer from.

Such a cache has one scale for some channels of a token: with 4 bits the step is about an eighth of
the largest of them, so that a channel below a sixteenth of it is stored as zero. Where the median
channel is smaller than that, half of the channels say nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from svsk_offline.storage.fold import powers_of_two

__all__ = ["LOST_RATIO", "KeyChannels"]

LOST_RATIO: Final = 16.0
"""Largest over median channel above which a 4-bit code, whose step is an eighth of the largest,
rounds more than half of the channels to zero."""


@dataclass(frozen=True)
class KeyChannels:
    """Largest magnitudes of the key channels of one layer, on calibration text.

    Rotary turns two channels into each other, so both count with the larger one's magnitude.

    Attributes:
        block: number of the decoder block.
        largest: of all channels of all heads.
        median: of them.
        ratio: largest over median of the head where that is largest.
        folded_ratio: the same with powers of two folded into queries and keys; None where they
            cannot be.
    """

    block: int
    largest: float
    median: float
    ratio: float
    folded_ratio: float | None = None

    @classmethod
    def of(
        cls, block: int, maxima: torch.Tensor, heads: int, exponents: torch.Tensor | None
    ) -> "KeyChannels":
        """Of a layer.

        Args:
            block: number of the decoder block.
            maxima: float32 [factors], largest magnitude of each rotary pair, head by head.
            heads: how many.
            exponents: of two, int8 or float32 [factors], by which they are divided; None for
                nothing.
        """
        rows = maxima.view(heads, -1)
        folded = None
        if exponents is not None:
            folded = _ratio(rows / powers_of_two(exponents).view_as(rows))
        return cls(block, float(rows.max()), float(rows.median()), _ratio(rows), folded)

    def to_json(self) -> dict[str, Any]:
        """The attributes."""
        return asdict(self)


def _ratio(rows: torch.Tensor) -> float:
    """Largest over median of the row where that is largest; 0 for rows of zeros."""
    largest, median = rows.amax(1), rows.median(1).values
    # Half a head of zeros: a million stands for any larger ratio, which JSON could not hold.
    ratios = largest / torch.maximum(median, largest / 1e6)
    return float(ratios.where(largest > 0, 0).max())
