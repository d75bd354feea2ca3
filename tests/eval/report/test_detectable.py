# SPDX-License-Identifier: Apache-2.0
"""The difference that data would have shown: simulated models are told apart in 80% of cases."""

import numpy as np
import pytest
from scipy import stats

from svsk_eval.report.detectable import (
    detectable_by_repeats,
    detectable_mean,
    detectable_over_tasks,
    detectable_rate,
    power_of_rate,
)
from svsk_eval.report.paired_statistics import mcnemar_midp, paired, sign_flip_p
from svsk_eval.report.pooling import pooled


@pytest.mark.parametrize(
    ("n", "lost", "gained"), [(20, 0, 0), (100, 5, 5), (164, 10, 12), (164, 0, 3), (1319, 60, 40)]
)
def test_models_that_differ_by_it_are_told_apart_in_80_percent(
    n: int, lost: int, gained: int
) -> None:
    difference = detectable_rate(lost, gained, n)
    assert difference is not None
    flips = max((lost + gained + 2) / (n + 2), difference)
    shares = [(flips + difference) / 2, (flips - difference) / 2, 1 - flips]
    drawn = np.random.default_rng(0).multinomial(n, shares, 20_000)
    found = (mcnemar_midp(drawn[:, 0], drawn[:, 1]) < 0.05).mean()
    assert found == pytest.approx(0.8, abs=0.012)
    assert found == pytest.approx(power_of_rate(difference, flips, n), abs=0.012)


def test_rates_by_hand() -> None:
    # Five items that all flip one way give p = 2 / 32 - 1 / 32, four give 1 / 16.
    assert power_of_rate(1.0, 1.0, 5) == pytest.approx(1.0)
    assert power_of_rate(1.0, 1.0, 4) == 0.0
    assert detectable_rate(0, 0, 4) is None
    # all five must flip, which they do together in 80% of cases: d^5 = 0.8
    assert detectable_rate(0, 0, 5) == pytest.approx(0.8**0.2, abs=1e-5)
    # more flips hide more, more items show more
    few, many, large = (detectable_rate(f, f, n) for f, n in ((5, 100), (20, 100), (50, 1000)))
    assert few is not None
    assert many is not None
    assert large is not None
    assert large < few < many
    # with many items it is 2.8 standard errors
    wide = detectable_rate(600, 600, 10_000)
    assert wide == pytest.approx(2.802 * np.sqrt(0.12 / 10_000), rel=0.01)


@pytest.mark.parametrize("n", [12, 60])
def test_means(n: int) -> None:
    rng = np.random.default_rng(1)
    difference = detectable_mean(1 / np.sqrt(n), n)
    assert difference is not None
    found = np.mean(
        [sign_flip_p(rng.normal(difference, 1, n), resamples=499) < 0.05 for _ in range(400)]
    )
    assert found == pytest.approx(0.8, abs=0.06)


def test_no_spread_says_nothing() -> None:
    assert detectable_mean(0.0, 10) is None
    assert detectable_mean(None, 1) is None
    assert detectable_over_tasks([np.full(4, 0.25)]) is None
    assert detectable_over_tasks([np.zeros(4), np.zeros(1)]) is None


def test_several_answers_to_an_item() -> None:
    rng = np.random.default_rng(3)
    items, answers = 4000, 4
    # items differ between the models by 0.1, drawing moves each answer by 0.3
    base = rng.normal(0, 1, (items, 1))
    reference = base + rng.normal(0, 0.3, (items, answers))
    variant = base + rng.normal(0, 0.1, (items, 1)) + rng.normal(0, 0.3, (items, answers))
    means = paired(reference.mean(axis=1), variant.mean(axis=1), binary=False, resamples=99)
    both = detectable_by_repeats(means.detectable, reference, variant)
    assert both is not None
    one, any_number = both
    alone = paired(reference[:, 0], variant[:, 0], binary=False, resamples=99)
    assert one == pytest.approx(alone.detectable, rel=0.03)
    assert any_number == pytest.approx(2.802 * 0.1 / np.sqrt(items), rel=0.1)
    # drawing alone: more answers would find any difference, more items need not be
    flat = base + rng.normal(0, 0.3, (items, answers))
    only = detectable_by_repeats(1.0, reference, flat)
    assert only is not None
    assert only[1] < 0.3
    assert detectable_by_repeats(1.0, reference, reference) is None
    assert detectable_by_repeats(None, reference, variant) is None


def test_over_tasks() -> None:
    rng = np.random.default_rng(2)
    flips = np.repeat([-1.0, 1.0, 0.0], (7, 3, 90))
    shares = rng.normal(0, 0.2, 50)
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    binary = (12 / 102 - (4 / 102) ** 2) / 102
    assert detectable_over_tasks([flips, shares]) == pytest.approx(
        quantiles * np.sqrt(binary + shares.var(ddof=1) / 50) / 2
    )
    # no flip is no certainty
    none = detectable_over_tasks([np.zeros(100)])
    assert none == pytest.approx(quantiles * np.sqrt(2 / 102 / 102))


def test_it_is_among_the_paired_figures() -> None:
    right = np.repeat([1.0, 0.0], (60, 40))
    variant = right.copy()
    variant[:7] = 0
    variant[-3:] = 1
    assert paired(right, variant, binary=True).detectable == detectable_rate(7, 3, 100)
    loose = paired(right, variant, binary=False)
    assert loose.detectable == detectable_mean(loose.se, 100)
    over = pooled([(right, variant)], resamples=99)
    assert over.detectable == detectable_over_tasks([variant - right])
