# SPDX-License-Identifier: Apache-2.0
"""Paired statistics of two models on the same items, on plain arrays.

Most of the spread between items is common to both models, so everything here is computed on the
differences of pairs. Where the caller says that scores are right or wrong, 1 or 0, they are rates
of success; with n items, ``lost`` of them right only with the reference and ``gained`` only with
the variant, their difference is (gained - lost) / n, and it gets an interval and a test made for
that case. All other figures get a bootstrap and a sign-flip test. Seeds are fixed: the same data
give the same figures.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from svsk_eval.errors import EvalError
from svsk_eval.report.detectable import detectable_mean, detectable_rate

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "SEED",
    "Estimate",
    "Interval",
    "Paired",
    "all_equal",
    "batch_size",
    "bonett_price",
    "bootstrap_interval",
    "estimate",
    "holm",
    "is_binary",
    "mcnemar_midp",
    "paired",
    "sign_flip_p",
]

FloatArray = npt.NDArray[np.float64]

LEVEL: Final = 0.95
RESAMPLES: Final = 9999
SEED: Final = 20240229
_BATCH_ELEMENTS: Final = 2_000_000  # bounds the memory of resampling, whatever the number of items


@dataclass(frozen=True)
class Interval:
    """A confidence interval at :data:`LEVEL`, in the units of its figure."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean over items.

    Attributes:
        value: the mean.
        se: its standard error, s / sqrt(n) with the sample's standard deviation s; None with one
            item.
        interval: Wilson's for a rate of success, Student's t otherwise; None where that is
            undefined.
    """

    value: float
    se: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Paired:
    """One figure of the reference and of a variant over the same items.

    Attributes:
        n: items.
        binary: the scores are right or wrong, 1 or 0.
        reference: the reference's mean.
        variant: the variant's.
        difference: variant - reference.
        se: standard error of the difference over items; None with one item.
        lost: items on which the variant scores lower; for rates of success those that went from
            right to wrong.
        gained: items on which it scores higher.
        interval: of the difference; None where it is undefined, and ``notes`` says why.
        p: two-sided p-value of the difference being zero.
        detectable: the smallest difference that such items would show, see
            :mod:`svsk_eval.report.detectable`; None where there is none.
        method: how interval and p-value were computed.
        notes: what a reader of the figures should know, in sentences.
    """

    n: int
    binary: bool
    reference: Estimate
    variant: Estimate
    difference: float
    se: float | None
    lost: int
    gained: int
    interval: Interval | None
    p: float
    detectable: float | None
    method: str
    notes: tuple[str, ...] = ()

    @property
    def recovery(self) -> float | None:
        """The variant's mean divided by the reference's.

        None unless the reference's is above zero.
        """
        return self.variant.value / self.reference.value if self.reference.value > 0 else None


def bonett_price(
    lost: npt.ArrayLike, gained: npt.ArrayLike, n: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Adjusted Wald interval of the difference of two paired proportions, (gained - lost) / n.

    With one pair added to each discordant cell, q_l = (lost + 1) / (n + 2) and q_g = (gained + 1) /
    (n + 2):

        q_g - q_l -+ z sqrt((q_g + q_l - (q_g - q_l)^2) / (n + 2))

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", Journal of Educational and Behavioral Statistics 37(4), 2012; recommended
    by Fagerland, Lydersen and Laake, "Recommended tests and confidence intervals for paired
    binomial proportions", Statistics in Medicine 33(16), 2014.

    Args:
        lost: pairs of success and failure, any shape.
        gained: pairs of failure and success, the same shape.
        n: all pairs.

    Returns:
        Lower and upper limit, of that shape, within -1 and 1.
    """
    down, up, pairs = (np.asarray(values, dtype=np.float64) for values in (lost, gained, n))
    rate_down, rate_up = (down + 1) / (pairs + 2), (up + 1) / (pairs + 2)
    centre = rate_up - rate_down
    half = stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(
        (rate_up + rate_down - centre**2) / (pairs + 2)
    )
    return np.clip(centre - half, -1.0, 1.0), np.clip(centre + half, -1.0, 1.0)


def mcnemar_midp(lost: npt.ArrayLike, gained: npt.ArrayLike) -> FloatArray:
    """McNemar's exact test in its mid-p form: twice the smaller one-sided mid-p-value.

    With m = min(lost, gained) and X binomial over the lost + gained discordant pairs with
    probability 1/2:

        p = 2 P(X <= m) - P(X = m)

    Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data: mid-p and
    asymptotic are better than exact conditional", BMC Medical Research Methodology 13:91, 2013. For
    lost = gained the paper subtracts half of P(X = m) from 1, which would give 0.5 for models that
    agree on every item; here p is 1, as the definition says.

    Args:
        lost: pairs of success and failure, any shape.
        gained: pairs of failure and success, the same shape.

    Returns:
        The p-values, of that shape, 0 to 1.
    """
    down, up = np.asarray(lost, dtype=np.int64), np.asarray(gained, dtype=np.int64)
    smaller, both = np.minimum(down, up), down + up
    p = 2 * stats.binom.cdf(smaller, both, 0.5) - stats.binom.pmf(smaller, both, 0.5)
    return np.clip(np.asarray(p, dtype=np.float64), 0.0, 1.0)


def bootstrap_interval(
    differences: FloatArray, resamples: int = RESAMPLES
) -> tuple[Interval | None, str, str]:
    """Bootstrap interval of a mean.

    Bias-corrected and accelerated (BCa), by percentiles where that is undefined.

    Efron, "Better bootstrap confidence intervals", Journal of the American Statistical Association
    82, 1987, by :func:`scipy.stats.bootstrap`.

    Args:
        differences: one per item, [n].
        resamples: of the items, with replacement.

    Returns:
        The interval, the name of the method, and a sentence if there is something to know, else
        nothing; None for an interval that cannot be computed.
    """
    if len(differences) < 2:
        return None, "none", "There is one item, so nothing can be said about the spread."
    if all_equal(differences):
        same = float(differences[0])
        note = (
            "All items differ by the same amount,"
            " so the bootstrap interval has no width and says nothing."
        )
        return Interval(same, same), "bootstrap (percentile)", note
    for method, name in (("BCa", "bootstrap (BCa)"), ("percentile", "bootstrap (percentile)")):
        with warnings.catch_warnings():
            # DegenerateDataWarning: answered by the check below
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = stats.bootstrap(
                (differences,),
                _mean,
                method=method,
                confidence_level=LEVEL,
                n_resamples=resamples,
                batch=batch_size(len(differences)),
                random_state=np.random.default_rng(SEED),
            ).confidence_interval
        if np.isfinite([interval.low, interval.high]).all():
            note = (
                ""
                if method == "BCa"
                else "The BCa interval is undefined here; percentiles were used."
            )
            return Interval(float(interval.low), float(interval.high)), name, note
    raise EvalError(
        f"No bootstrap interval for differences between {differences.min()} and"
        f" {differences.max()}: expected finite values of ordinary size. Check the scores of the"
        " two models."
    )


def sign_flip_p(differences: FloatArray, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of paired differences of mean zero, by flipping signs at random.

    Fisher's permutation test for pairs, exact if all flips can be tried, by
    :func:`scipy.stats.permutation_test`.

    Args:
        differences: one per item, [n].
        resamples: random flips, if there are more than that many.
    """
    moved = differences[differences != 0]  # flipping a zero changes nothing
    if len(moved) < 2:
        return 1.0
    return float(
        stats.permutation_test(
            (moved,),
            _mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=batch_size(len(moved)),
            random_state=np.random.default_rng(SEED),
        ).pvalue
    )


def estimate(values: FloatArray, binary: bool) -> Estimate:
    """The mean of one model's values with its standard error and interval.

    Wilson's interval (Journal of the American Statistical Association 22, 1927) for rates of
    success, by :func:`scipy.stats.binomtest`; otherwise the mean -+ t(n - 1) standard errors.

    Args:
        values: one per item, [n].
        binary: every value is 0 or 1.
    """
    n, mean = len(values), float(values.mean())
    se = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    if binary:
        interval = stats.binomtest(int(values.sum()), n).proportion_ci(LEVEL, method="wilson")
        return Estimate(mean, se, Interval(float(interval.low), float(interval.high)))
    if se is None:
        return Estimate(mean, None, None)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * se
    return Estimate(mean, se, Interval(mean - half, mean + half))


def paired(
    reference: FloatArray, variant: FloatArray, *, binary: bool, resamples: int = RESAMPLES
) -> Paired:
    """Compare two models' values of the same items.

    Args:
        reference: the reference's values, one per item, [n].
        variant: the variant's, in the same order.
        binary: the values are right or wrong, 1 or 0. Counts that happen to be 0 or 1 are not.
        resamples: of the bootstrap and the sign flips.

    Raises:
        EvalError: the two have different lengths, or none; or binary values are not all 0 or 1.
    """
    if reference.shape != variant.shape or reference.ndim != 1 or not len(reference):
        raise EvalError(
            f"Cannot pair values of shapes {reference.shape} and {variant.shape}: expected one per"
            " item, in the same order. Score both models on the same items."
        )
    n, differences = len(reference), variant - reference
    if binary and not (is_binary(reference) and is_binary(variant)):
        other = next(float(value) for value in (*reference, *variant) if value not in (0.0, 1.0))
        raise EvalError(
            f"A value of {other} among right or wrong answers: expected 0 or 1."
            " Pair them as other values."
        )
    lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
    interval: Interval | None
    method, note = _BINARY, ""
    if binary:
        low, high = bonett_price(lost, gained, n)
        interval, p = Interval(float(low), float(high)), float(mcnemar_midp(lost, gained))
    else:
        interval, name, note = bootstrap_interval(differences, resamples)
        p, method = sign_flip_p(differences, resamples), f"{name}, sign-flip test"
    se = float(differences.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Paired(
        n=n,
        binary=binary,
        reference=estimate(reference, binary),
        variant=estimate(variant, binary),
        difference=float(differences.mean()),
        se=se,
        lost=lost,
        gained=gained,
        interval=interval,
        p=p,
        detectable=detectable_rate(lost, gained, n) if binary else detectable_mean(se, n),
        method=method,
        notes=(note,) if note else (),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment.

    Reject where the result is below a level, and errors stay below it in all tests.

    With the m values in ascending order, the i-th becomes max_{j <= i} min(1, (m - j + 1) p_j).
    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6(2), 1979.

    Args:
        p_values: raw ones, in any order.

    Returns:
        The adjusted ones, in the same order.
    """
    raw = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    adjusted = np.empty_like(raw)
    adjusted[order] = np.maximum.accumulate(
        np.minimum(1.0, raw[order] * np.arange(len(raw), 0, -1))
    )
    return [float(value) for value in adjusted]


_BINARY: Final = "Bonett-Price interval, McNemar mid-p"


def all_equal(values: FloatArray) -> bool:
    """Whether they are equal but for rounding, which is all that resampling would measure."""
    spread = float(np.ptp(values))
    largest = max(1.0, float(np.abs(values).max()))
    return math.isfinite(spread) and spread <= 1e-12 * largest


def is_binary(values: FloatArray) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def _mean(values: Any, axis: int) -> Any:
    return np.mean(values, axis=axis)


def batch_size(n: int) -> int:
    """Resamples of ``n`` items to hold in memory at once."""
    return max(1, _BATCH_ELEMENTS // n)
