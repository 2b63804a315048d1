"""Running statistics of several models as those of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bntool.batchnorm import DEFAULT_EPS

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PooledStatistics:
    """Mean and variance of a mixture.

    Attributes:
        mean, variance: float64, of shape (channels,).
        between: of each channel, the share of its variance that comes from means that differ, 0 to 1.
        ratio: of each channel, the largest of the variances + eps over the smallest.
    """

    mean: Array
    variance: Array
    between: Array
    ratio: Array


def pool_statistics(means: Sequence[Array], variances: Sequence[Array], weights: Sequence[float]) -> PooledStatistics:
    """Compute the mean and variance of values that are drawn from several populations, by the law of total variance.

    With w the weights: mean = sum w m, variance = sum w v + sum w (m - mean)^2. An average of the variances alone
    leaves out the second sum.

    Args:
        means, variances: of each population, float64, of shape (channels,).
        weights: one each; they sum to 1.
    """
    first = means[0]
    # from the first on, so that equal statistics stay exactly what they are
    mean = first + sum(weight * (one - first) for one, weight in zip(means, weights, strict=True))
    within = variances[0] + sum(w * (one - variances[0]) for one, w in zip(variances, weights, strict=True))
    between = np.asarray(sum(weight * (one - mean) ** 2 for one, weight in zip(means, weights, strict=True)))
    variance = within + between
    share = np.divide(between, variance, out=np.zeros_like(between), where=variance > 0)
    ratio = (np.max(variances, axis=0) + DEFAULT_EPS) / (np.min(variances, axis=0) + DEFAULT_EPS)
    return PooledStatistics(mean, variance, share, ratio)
