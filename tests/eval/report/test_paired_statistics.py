# SPDX-License-Identifier: Apache-2.0
"""Paired statistics.

Worked examples, cases by hand, and simulations of what intervals and tests promise.
"""

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from svsk_eval.errors import EvalError
from svsk_eval.report.paired_statistics import (
    Interval,
    Paired,
    bonett_price,
    bootstrap_interval,
    estimate,
    holm,
    mcnemar_midp,
    paired,
    sign_flip_p,
)
from svsk_eval.report.pooling import Pooled, pooled

FloatArray = npt.NDArray[np.float64]


def array(*values: float) -> FloatArray:
    return np.array(values, dtype=np.float64)


def limits(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high


def correlated_flips(
    rng: np.random.Generator, n: int, rates: tuple[float, float], count: int
) -> tuple[FloatArray, ...]:
    """Counts [count] of lost and gained items of two models of given rates."""
    hardness = rng.normal(0, 1.5, (count, n))
    spread = np.sqrt(1.5**2 + 0.5**2)
    first, second = (
        (hardness + rng.normal(0, 0.5, (count, n))) / spread < stats.norm.ppf(rate)
        for rate in rates
    )
    return (first & ~second).sum(axis=1), (second & ~first).sum(axis=1)


def test_worked_examples_of_the_literature() -> None:
    # Airway hyper-responsiveness before and after stem cell transplantation (Bentur et al. 2009),
    # 21 pairs, and complete response before and after consolidation therapy (Cavo et al. 2012), 161
    # pairs: the examples of Fagerland, Lydersen and Laake, whose mid-p-values are 0.039 and 0.035.
    assert mcnemar_midp([7, 16], [1, 6]) == pytest.approx([0.0391, 0.0347], abs=5e-5)
    low, high = bonett_price([7, 16], [1, 6], [21, 161])
    assert low == pytest.approx([-0.5084, -0.1195], abs=5e-5)
    assert high == pytest.approx([-0.0134, -0.0032], abs=5e-5)


def test_midp_by_hand() -> None:
    # 1 against 7 of 8: 2 (C(8,0) + C(8,1)) / 256 - C(8,1) / 256
    assert mcnemar_midp(7, 1) == pytest.approx((2 * 9 - 8) / 256, abs=1e-14)
    assert mcnemar_midp(0, 1) == pytest.approx(0.5)
    assert mcnemar_midp([0, 1, 500], [0, 1, 500]) == pytest.approx([1.0, 1.0, 1.0], abs=1e-12)
    assert mcnemar_midp(3, 9) == mcnemar_midp(9, 3)


def test_bonett_price_by_hand() -> None:
    # n = 8, none lost, two gained: q = 1/10 and 3/10, variance (4/10 - 4/100) / 10.
    low, high = bonett_price(0, 2, 8)
    half = 1.959964 * np.sqrt(0.036)
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-6), pytest.approx(0.2 + half, abs=1e-6))
    assert bonett_price(1, 0, 1)[0] == -1.0


def test_identical_models() -> None:
    scores = array(1, 0, 1, 1, 0, 0, 1, 1, 0, 1)
    pair = paired(scores, scores, binary=True)
    assert (pair.n, pair.binary, pair.lost, pair.gained, pair.difference, pair.p) == (
        10,
        True,
        0,
        0,
        0.0,
        1.0,
    )
    assert pair.recovery == 1.0
    low, high = limits(pair.interval)
    assert low < -0.1 < 0.1 < high


def test_identical_models_with_other_scores() -> None:
    scores = array(0.1, 0.5, 0.7)
    pair = paired(scores, scores, binary=False)
    assert (pair.lost, pair.gained, pair.p, pair.interval) == (0, 0, 1.0, Interval(0.0, 0.0))
    assert "no width" in pair.notes[0]


def test_a_pair_of_rates() -> None:
    reference, variant = array(1, 1, 1, 0, 0, 1, 1, 1), array(1, 0, 0, 1, 0, 1, 1, 1)
    pair = paired(reference, variant, binary=True)
    assert (pair.lost, pair.gained) == (2, 1)
    assert (pair.reference.value, pair.variant.value, pair.difference) == (0.75, 0.625, -0.125)
    assert pair.recovery == pytest.approx(5 / 6)
    # Differences -1, -1, 1 and five zeros: squares around the mean sum to 3 - 8 / 64.
    assert pair.se == pytest.approx(np.sqrt((3 - 8 / 64) / 7 / 8))
    assert pair.reference.se == pytest.approx(np.sqrt(0.75 * 0.25 / 7))
    assert pair.p == mcnemar_midp(2, 1)
    assert limits(pair.interval) == tuple(float(value) for value in bonett_price(2, 1, 8))
    assert "McNemar" in pair.method


def test_a_pair_of_other_scores() -> None:
    reference, variant = array(0.2, 0.4, 0.9, 0.5), array(0.3, 0.4, 0.5, 0.4)
    pair = paired(reference, variant, binary=False)
    assert (pair.binary, pair.lost, pair.gained, pair.n) == (False, 2, 1, 4)
    assert pair.difference == pytest.approx(-0.1)
    low, high = limits(pair.interval)
    assert -0.4 <= low < -0.1 < high <= 0.1
    assert pair.method == "bootstrap (BCa), sign-flip test"


def test_a_reference_that_scores_zero_has_no_recovery() -> None:
    assert paired(array(0, 0, 0), array(0, 1, 0), binary=True).recovery is None
    assert paired(array(-0.5, -0.25), array(-0.5, -1.0), binary=False).recovery is None


def test_one_item() -> None:
    rate = paired(array(1), array(0), binary=True)
    other = paired(array(0.5), array(0.25), binary=False)
    low, high = limits(rate.interval)
    assert -1 <= low < 0 < high <= 1
    assert (rate.p, rate.se, rate.reference.se) == (pytest.approx(0.5), None, None)
    assert (other.interval, other.se, other.p, other.lost) == (None, None, 1.0, 1)
    assert "one item" in other.notes[0]


@pytest.mark.parametrize(("reference", "variant"), [((1, 0), (1,)), ((), ())])
def test_what_cannot_be_paired(reference: tuple[float, ...], variant: tuple[float, ...]) -> None:
    with pytest.raises(EvalError, match="Cannot pair values of shapes"):
        paired(array(*reference), array(*variant), binary=True)


def test_only_the_caller_knows_what_is_right_or_wrong() -> None:
    reference, variant = array(1, 1, 0, 1, 0, 1), array(0, 1, 0, 0, 1, 1)
    rates, counts = (paired(reference, variant, binary=binary) for binary in (True, False))
    assert (rates.binary, rates.method) == (True, "Bonett-Price interval, McNemar mid-p")
    assert (counts.binary, counts.method) == (False, "bootstrap (BCa), sign-flip test")
    # Of the 8 flips of -1, -1 and 1 all sum to at least 1 in size; the mid-p-value is 2 (1 + 3) / 8
    # - 3 / 8.
    assert (counts.p, rates.p) == (1.0, pytest.approx(5 / 8))
    low, high = limits(counts.reference.interval)
    assert (low + high) / 2 == pytest.approx(4 / 6)  # Student's is symmetric, Wilson's is not
    assert high > 1 > limits(rates.reference.interval)[1]
    for pair in ((reference, array(0, 1, 0, 0.25, 1, 1)), (array(0, 1, 0, 0.25, 1, 1), reference)):
        with pytest.raises(
            EvalError, match=r"A value of 0\.25 among right or wrong answers: expected 0 or 1"
        ):
            paired(*pair, binary=True)


def test_the_same_difference_everywhere() -> None:
    interval, method, note = bootstrap_interval(
        array(0.3, 0.1, 0.7) - array(0.2, 0.0, 0.6)
    )  # equal but for rounding
    assert limits(interval) == pytest.approx((0.1, 0.1))
    assert ("percentile" in method, "no width" in note) == (True, True)


def test_bootstrap_agrees_with_theory() -> None:
    values = np.random.default_rng(3).normal(0.2, 1.0, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval, method, note = bootstrap_interval(values)
    error = values.std(ddof=1) / 20
    assert limits(interval) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )
    assert (method, note) == ("bootstrap (BCa)", "")
    assert bootstrap_interval(values)[0] == interval


def test_sign_flips_are_exact_for_few_items() -> None:
    assert sign_flip_p(array(1, 2, 3, 4)) == 2 / 16
    assert sign_flip_p(array(1, 2, 0, 3, 0, 4)) == 2 / 16
    assert sign_flip_p(array(0, 0.5)) == 1.0
    values = np.random.default_rng(4).normal(0.15, 1.0, 200)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_estimates() -> None:
    result = estimate(array(*[1] * 8, *[0] * 2), binary=True)
    assert limits(result.interval) == pytest.approx((0.4902, 0.9433), abs=5e-5)  # Wilson, 8 of 10
    result = estimate(array(1, 2, 3), binary=False)
    assert (result.value, result.se) == (2.0, pytest.approx(1 / np.sqrt(3)))
    assert limits(result.interval) == pytest.approx(
        (2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)), abs=1e-5
    )
    assert estimate(array(2.5), binary=False).interval is None


@pytest.mark.parametrize(
    ("n", "rate"), [(100, 0.7), (150, 0.6), (250, 0.6), (250, 0.8), (1000, 0.9)]
)
def test_rates_under_the_null(n: int, rate: float) -> None:
    lost, gained = correlated_flips(np.random.default_rng(n), n, (rate, rate), 3000)
    low, high = bonett_price(lost, gained, n)
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.975
    assert (mcnemar_midp(lost, gained) < 0.05).mean() <= 0.06


@pytest.mark.parametrize(("n", "rate"), [(20, 0.5), (50, 0.9)])
def test_rates_of_few_items_err_on_the_safe_side(n: int, rate: float) -> None:
    lost, gained = correlated_flips(np.random.default_rng(n), n, (rate, rate), 3000)
    low, high = bonett_price(lost, gained, n)
    assert ((low <= 0) & (high >= 0)).mean() >= 0.95
    assert (mcnemar_midp(lost, gained) < 0.05).mean() <= 0.05


@pytest.mark.parametrize(
    ("n", "rates"), [(100, (0.6, 0.5)), (250, (0.7, 0.65)), (1000, (0.9, 0.87))]
)
def test_rates_that_differ(n: int, rates: tuple[float, float]) -> None:
    lost, gained = correlated_flips(np.random.default_rng(n), n, rates, 3000)
    low, high = bonett_price(lost, gained, n)
    difference = rates[1] - rates[0]
    assert 0.93 <= ((low <= difference) & (difference <= high)).mean() <= 0.975
    assert (mcnemar_midp(lost, gained) < 0.05).mean() > 0.2


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_other_scores_in_simulation(difference: float) -> None:
    rng, count, n = np.random.default_rng(5), 500, 80
    covered = rejected = 0
    for _ in range(count):
        items = rng.beta(2, 2, n)
        reference = items + rng.normal(0, 0.1, n)
        variant = (
            items + rng.normal(0, 0.1, n) + (rng.exponential(difference, n) if difference else 0.0)
        )
        pair = paired(reference, variant, binary=False, resamples=599)
        low, high = limits(pair.interval)
        covered += low <= difference <= high
        rejected += pair.p < 0.05
    assert 0.93 <= covered / count <= 0.975
    assert rejected / count <= 0.06 if difference == 0 else rejected / count > 0.9


def two_tasks() -> list[tuple[FloatArray, FloatArray]]:
    return [(array(1, 1, 0, 0), array(1, 0, 0, 0)), (array(1, 1, 1, 1, 0), array(1, 1, 1, 0, 1))]


def test_tasks_count_the_same() -> None:
    result = pooled(two_tasks())
    assert (result.tasks, result.recovery_tasks) == (2, 2)
    assert result.difference == pytest.approx((-0.25 + 0.0) / 2)
    assert (result.reference, result.variant) == (pytest.approx(0.65), pytest.approx(0.525))
    assert result.recovery == pytest.approx((0.5 + 1.0) / 2)
    low, high = limits(result.interval)
    assert low < result.difference < high
    # Flips of -1/4, -1/5, 1/5: sums of at least 1/4 in size are all but the two of -1/4 + 2/5 =
    # 0.15.
    assert result.p == pytest.approx(6 / 8)


def test_a_task_that_the_reference_fails() -> None:
    zero = (array(0, 0, 0), array(0, 1, 0))
    result = pooled([*two_tasks(), zero])
    assert (result.recovery_tasks, result.recovery) == (2, pytest.approx(0.75))
    assert result.difference == pytest.approx((-0.25 + 0 + 1 / 3) / 3)
    assert any("zero or less in 1 task" in note for note in result.notes)
    only = pooled([zero])
    assert (only.recovery, only.recovery_interval) == (None, None)


def test_tasks_without_spread() -> None:
    same = pooled([(array(0.5, 0.25), array(0.5, 0.25))])
    single = pooled([(array(1), array(0)), two_tasks()[0]])
    for result, words in ((same, "same amount"), (single, "one item")):
        assert result.interval is None
        assert words in result.notes[0]
    assert same.p == 1.0
    with pytest.raises(EvalError, match="There is no task to pool: expected at least one"):
        pooled([])


def test_differences_beyond_what_can_be_added_up() -> None:
    message = "No bootstrap interval for differences between -inf and inf: expected finite values"
    with pytest.raises(EvalError, match=message):
        bootstrap_interval(array(-np.inf, 1, np.inf, 0))


def test_the_stratified_interval_agrees_with_theory() -> None:
    rng = np.random.default_rng(6)
    pairs = []
    for n in (300, 900):
        reference = rng.normal(1.0, 0.5, n)
        pairs.append((reference, reference + rng.normal(-0.02, 0.3, n)))
    result = pooled(pairs)
    error = np.sqrt(sum((other - one).var(ddof=1) / len(one) for one, other in pairs)) / 2
    low, high = limits(result.interval)
    assert (low, high) == pytest.approx(
        (result.difference - 1.96 * error, result.difference + 1.96 * error), abs=0.1 * error
    )
    assert isinstance(result, Pooled)
    low, high = limits(result.recovery_interval)
    assert low < 0.98 < high


def test_the_pooled_test_under_the_null() -> None:
    rng, covered, rejected, count = np.random.default_rng(7), 0, 0, 400
    for _ in range(count):
        pairs = []
        for n in (40, 90):
            hardness = rng.normal(0, 1, n)
            one, other = ((hardness + rng.normal(0, 0.6, n) > -0.4).astype(float) for _ in range(2))
            pairs.append((one, other))
        result = pooled(pairs, resamples=599)
        low, high = limits(result.interval)
        covered += low <= 0 <= high
        rejected += result.p < 0.05
    assert 0.93 <= covered / count <= 0.975
    assert rejected / count <= 0.06


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and the last not
    # below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_figures_are_the_same_again() -> None:
    rng = np.random.default_rng(8)
    reference, variant = rng.random(50), rng.random(50)
    again: list[Paired] = [paired(reference, variant, binary=False) for _ in range(2)]
    assert again[0] == again[1]
    assert pooled([(reference, variant)]) == pooled([(reference, variant)])
