# SPDX-License-Identifier: Apache-2.0
"""Standard errors of series of scores; without torch."""

import numpy as np
import numpy.typing as npt

__all__ = ["FloatArray", "jackknife_se", "mean_se"]

FloatArray = npt.NDArray[np.float64]


def mean_se(values: FloatArray) -> float | None:
    """Standard error of the mean of ``values`` [C, T], whose rows (chunks) are the samples.

    Returns:
        std(row means, ddof=1) / sqrt(C), or None for one row.
    """
    if values.shape[0] < 2:
        return None
    return float(values.mean(axis=1).std(ddof=1) / np.sqrt(values.shape[0]))


def jackknife_se(values: FloatArray, quantile: float) -> float | None:
    """Standard error of a quantile of all ``values`` [C, T] by the jackknife over rows (chunks).

    se^2 = (C - 1) / C * sum_i (theta_i - mean theta)^2, with theta_i the quantile without row i
    (Efron, The Jackknife, the Bootstrap and Other Resampling Plans, 1982, ch. 3). Leaving out whole
    chunks also makes the jackknife usable for a quantile, where leaving out single values fails
    (Shao and Wu, Annals of Statistics 17, 1989).

    Args:
        values: the sample, [C, T].
        quantile: between 0 and 1.

    Returns:
        The standard error, or None for one row.
    """
    count = values.shape[0]
    if count < 2:
        return None
    left_out = np.array(
        [np.quantile(np.delete(values, row, axis=0), quantile) for row in range(count)]
    )
    return float(np.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum()))
