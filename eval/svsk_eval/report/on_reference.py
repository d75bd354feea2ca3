# SPDX-License-Identifier: Apache-2.0
"""Means over items of a variant's figures on the reference's own answers to a task."""

from dataclasses import dataclass

import numpy as np

from svsk_eval.report.paired_statistics import Estimate, estimate
from svsk_eval.report.schema import ReferenceAnswers

__all__ = ["OnReference", "on_reference"]


@dataclass(frozen=True)
class OnReference:
    """Every answer counts the same. What no answer has is None.

    Attributes:
        answers: how many.
        tokens: of them together.
        kl: KL(reference || model), nats per token.
        delta_nll: nats per token.
        flips: share of an answer's tokens at which the likeliest tokens of the two differ.
        never_flips: share of the answers in which none does.
        half_flip_by: tokens before the first flip, the median of the answers; None where more than
            half have no flip.
        ends_there: probability of ending where the reference's answer does.
        reference_ends_there: the reference's.
    """

    answers: int
    tokens: int
    kl: Estimate | None
    delta_nll: Estimate | None
    flips: Estimate | None
    never_flips: float | None
    half_flip_by: float | None
    ends_there: Estimate | None
    reference_ends_there: Estimate | None


def on_reference(scored: ReferenceAnswers) -> OnReference:
    """Summarise one task of one variant."""
    figures = {
        name: np.array([np.nan if value is None else value for value in values], np.float64)
        for name, values in scored.per_item.items()
    }

    def mean(values: np.ndarray) -> Estimate | None:
        known = values[~np.isnan(values)]
        return estimate(known, binary=False) if len(known) else None

    written = np.array(scored.tokens) > 0
    first = np.where(np.isnan(figures["first_flip"]), np.inf, figures["first_flip"])[written]
    median = float(np.median(first)) if len(first) else np.inf
    return OnReference(
        answers=len(scored.doc_ids),
        tokens=sum(scored.tokens),
        kl=mean(figures["kl"]),
        delta_nll=mean(figures["nll"] - figures["ref_nll"]),
        flips=mean(1 - figures["top1"]),
        never_flips=float(np.isinf(first).mean()) if len(first) else None,
        half_flip_by=median if np.isfinite(median) else None,
        ends_there=mean(figures["end_probability"]),
        reference_ends_there=mean(figures["ref_end_probability"]),
    )
