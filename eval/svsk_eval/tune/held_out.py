# SPDX-License-Identifier: Apache-2.0
"""Pieces of the calibration text that are scored on and never calibrated with."""

import torch

from svsk_eval.errors import EvalError
from svsk_offline.calibration import CalibrationSet
from svsk_offline.calibration.text import token_fingerprint

__all__ = ["split_calibration"]


def split_calibration(
    drawn: CalibrationSet, held_out: int
) -> tuple[CalibrationSet, CalibrationSet]:
    """Split calibration text into pieces to calibrate with and pieces to score on.

    Both are spread over the text.

    A piece that occurs twice, in a text that repeats itself, is never held out: no held-out piece
    equals another one.

    Args:
        drawn: pieces in the order of the text, int64 [samples, seq_len].
        held_out: how many to hold out.

    Returns:
        The pieces to calibrate with, [samples - held_out, seq_len], and those held out, [held_out,
        seq_len].

    Raises:
        EvalError: too few pieces differ from all others, or none would be left to calibrate with.
    """
    _, group, sizes = torch.unique(drawn.tokens, dim=0, return_inverse=True, return_counts=True)
    single = torch.nonzero(sizes[group] == 1).flatten()
    if len(single) < held_out or len(drawn.tokens) <= held_out:
        raise EvalError(
            f"Calibration text {drawn.source}: {len(single)} of {len(drawn.tokens)} pieces occur"
            f" once, too few to hold out {held_out} and calibrate with others. Give a text that"
            " repeats itself less, or lower --held-out."
        )
    middles = (torch.arange(held_out) * 2 + 1) * len(single) // (2 * held_out)
    chosen = torch.zeros(len(drawn.tokens), dtype=torch.bool)
    chosen[single[middles]] = True
    training, held = (
        CalibrationSet(tokens, drawn.source, token_fingerprint(tokens), bos=drawn.bos)
        for tokens in (drawn.tokens[~chosen].contiguous(), drawn.tokens[chosen].contiguous())
    )
    return training, held
