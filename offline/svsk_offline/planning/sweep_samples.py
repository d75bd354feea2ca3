# SPDX-License-Identifier: Apache-2.0
"""How many samples the losses of a bit budget are measured on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from svsk_offline.calibration import CalibrationSet
from svsk_offline.storage.dense_model import ModelSource
from svsk_vllm.format import ConfigGroup

__all__ = ["MEASURED_EVERY", "SweepSamples", "enough_samples"]

_TOKENS_PER_WIDTH: Final = 4
"""Tokens that losses are fitted to for each input feature of the widest matrix.

On SmolLM2's up_proj the error on other tokens is 4.1e-3 with 2.3 of them, 3.1e-3 with 5.3 and
2.7e-3 with 14. The narrower matrices of a model have more, so with few of them bits go to the
wrong ones.
"""

MEASURED_EVERY: Final = 4
"""One sample of so many is not fitted; losses are measured on it.

More than of the calibration itself: the tokens are fewer, and weighted by their gradients few of
them count.
"""


@dataclass(frozen=True)
class SweepSamples:
    """How many samples the losses of a bit budget are measured on.

    Attributes:
        count: of those there are.
        least: asked for, all without a wish.
        enough: for the tokens that each input feature needs, those that are measured on included.
    """

    count: int
    least: int
    enough: int

    @classmethod
    def of(cls, widest: int, seq_len: int, wanted: int | None, available: int) -> "SweepSamples":
        """More than asked for where matrices are wide.

        Args:
            widest: input features of the widest matrix.
            seq_len: tokens of a sample.
            wanted: samples asked for, None for all.
            available: samples there are.
        """
        # Those that are measured on come on top.
        fitted = -(-_TOKENS_PER_WIDTH * widest // seq_len)
        enough = -(-fitted * MEASURED_EVERY // (MEASURED_EVERY - 1))
        least = available if wanted is None else wanted
        return cls(min(available, max(least, enough)), least, enough)


def enough_samples(
    source: ModelSource,
    schemes: Mapping[str, ConfigGroup],
    wanted: int | None,
    calibration: CalibrationSet,
    say: Callable[[str], None],
) -> int:
    """Samples for the losses of a bit budget: more than asked for where matrices are wide."""
    available, seq_len = calibration.tokens.shape
    widest = max(source.tensors.describe(f"{name}.weight").shape[1] for name in schemes)
    samples = SweepSamples.of(widest, seq_len, wanted, available)
    count, enough = samples.count, samples.enough
    if count > samples.least:
        say(
            f"Losses are measured on {count} samples instead of {samples.least}:"
            f" {_TOKENS_PER_WIDTH} tokens to fit for each of {widest} input features, and one"
            f" sample in {MEASURED_EVERY} to measure on"
        )
    if count < enough:
        say(
            f"Losses are measured on {count} samples of {seq_len} tokens, which is all there are;"
            f" {enough} would give {_TOKENS_PER_WIDTH} tokens to fit for each of {widest} input"
            " features"
        )
    return count
