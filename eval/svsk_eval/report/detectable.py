# SPDX-License-Identifier: Apache-2.0
"""Which difference would data like these have shown?

The smallest true difference that a test at :data:`ALPHA` finds in :data:`POWER` of all samples of
as many items that spread as much as these do. A difference that was not found and is smaller than
that may well be there. Nothing of the difference that was measured enters, only how much items
differ between the two models.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = [
    "ALPHA",
    "POWER",
    "detectable_by_repeats",
    "detectable_mean",
    "detectable_over_tasks",
    "detectable_rate",
    "power_of_rate",
]

FloatArray = npt.NDArray[np.float64]

ALPHA: Final = 0.05
POWER: Final = 0.8

_TAIL: Final = 1e-9  # of the distribution of flips that is left out
_STEPS: Final = 20  # of bisection: the interval of differences is halved that often


def detectable_rate(lost: int, gained: int, n: int) -> float | None:
    """The detectable difference of two rates of success on the same items.

    It is that of McNemar's test in its mid-p form, whose power :func:`power_of_rate` gives exactly,
    at the rate of flips (lost + gained + 2) / (n + 2): one more each way, as Bonett and Price
    (2012) estimate it, so that few items without a flip do not look like many.

    Args:
        lost: items that went from right to wrong.
        gained: items that went from wrong to right.
        n: all items.

    Returns:
        A share of the items; None if not even losing all of them would be found that often.
    """
    flips = (lost + gained + 2) / (n + 2)
    if power_of_rate(1.0, flips, n) < POWER:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of_rate(middle, flips, n) >= POWER else (middle, high)
    return high


def power_of_rate(difference: float, flips: float, n: int) -> float:
    """How often McNemar's mid-p test finds a difference of two paired rates.

    The number of items that flip is binomial; given m of them, those that are lost are binomial
    with probability (1 + difference / flips) / 2, and the test rejects where the smaller of lost
    and gained is c(m) at most, the largest number whose mid-p-value is below :data:`ALPHA`.

    Args:
        difference: true loss, share of the items, 0 to 1.
        flips: share of the items that flip; a larger difference needs as many.
        n: items.

    Returns:
        The power, exact but for tails of 1e-9.
    """
    flips = max(flips, difference)
    first, last = stats.binom.ppf((_TAIL, 1 - _TAIL), n, flips).astype(int)
    m = np.arange(max(first, 1), last + 1)
    c = stats.binom.ppf(ALPHA / 2, m, 0.5)
    above = stats.binom.cdf(c, m, 0.5) - stats.binom.pmf(c, m, 0.5) / 2 >= ALPHA / 2
    c = np.where(above, c - 1, c)
    loss = (1 + difference / flips) / 2
    found = stats.binom.cdf(c, m, loss) + stats.binom.sf(m - c - 1, m, loss)
    return float((stats.binom.pmf(m, n, flips) * found).sum())


def detectable_mean(se: float | None, n: int) -> float | None:
    """The detectable difference of two means over the same items: (t_0.975 + t_0.8) se.

    t has n - 1 degrees of freedom. Miller, "Adding Error Bars to Evals" (arXiv:2411.00640, 2024),
    section 5, with normal quantiles.

    Args:
        se: standard error of the mean difference; None where there is none.
        n: items.

    Returns:
        A difference in the units of the mean; None without a spread.
    """
    if not se or n < 2:
        return None
    return float(stats.t.ppf(1 - ALPHA / 2, n - 1) + stats.t.ppf(POWER, n - 1)) * se


def detectable_by_repeats(
    detectable: float | None, reference: FloatArray, variant: FloatArray
) -> tuple[float, float] | None:
    """What several answers to each item did for a detectable difference.

    With K answers, the variance of an item's mean difference is that between items plus a Kth of
    that of drawing answers (Miller 2024, section 4.1). The latter is estimated within items, from
    the differences of the models' answers in the order in which they were drawn.

    Args:
        detectable: with the answers there are.
        reference: scores of the reference's answers, [items, K].
        variant: of the variant's, the same.

    Returns:
        It with one answer to each item, and with any number; None where there is none.
    """
    differences = variant - reference
    spread = float(differences.mean(axis=1).var(ddof=1)) if len(differences) > 1 else 0.0
    if detectable is None or not spread:
        return None
    drawing = float(differences.var(axis=1, ddof=1).mean())
    between = max(spread - drawing / differences.shape[1], 0.0)
    one, any_number = math.sqrt((between + drawing) / spread), math.sqrt(between / spread)
    return detectable * one, detectable * any_number


def detectable_over_tasks(differences: Sequence[FloatArray]) -> float | None:
    """The detectable mean over tasks of the same weight: (z_0.975 + z_0.8) se.

    The variances of the tasks' means add up, over the square of the number of tasks. Where all
    differences are -1, 0 or 1, one flip more each way is counted, see :func:`detectable_rate`.

    Args:
        differences: of the items of each task, variant - reference.

    Returns:
        A difference in the units of the scores; None where a task has one item, or there is no
        spread.
    """
    variance = 0.0
    for values in differences:
        n = len(values)
        if n < 2:
            return None
        if np.isin(values, (-1.0, 0.0, 1.0)).all():
            flips, moved = (np.abs(values).sum() + 2) / (n + 2), values.sum() / (n + 2)
            variance += float(flips - moved**2) / (n + 2)
        else:
            variance += float(values.var(ddof=1)) / n
    quantiles = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)
    return float(quantiles) * math.sqrt(variance) / len(differences) if variance else None
