"""Confidence intervals of accuracies and of their differences, over problems.

Problems are the sample: a strategy's correctness on one problem is one observation, and two strategies, or two
allocation policies, are compared on the same problems. Intervals are BCa bootstrap intervals (Efron, 1987, "Better
Bootstrap Confidence Intervals"), because accuracies often lie so near 0 or 1 that the percentile method is off on the
skewed side. Where all problems went alike a bootstrap has nothing to resample, and the interval is Wilson's (1927),
which does not collapse to a point.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from treedecode.common.arrays import FloatArray


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A difference of two means over the same problems, and its confidence interval."""

    estimate: float
    low: float
    high: float


def wilson(num_right: float, num_trials: int, *, level: float = 0.95) -> Interval:
    """Computes the score interval of a proportion.

    Raises:
        ValueError: there are no trials, or more right ones than trials.
    """
    if num_trials < 1:
        raise ValueError(f"num_trials: expected at least 1, got {num_trials}")
    if not 0 <= num_right <= num_trials:
        raise ValueError(f"num_right: expected from 0 to {num_trials}, got {num_right}")
    z, share = _z_score(level), num_right / num_trials
    scale = 1 + z * z / num_trials
    middle = (share + z * z / (2 * num_trials)) / scale
    half = z * math.sqrt(share * (1 - share) / num_trials + (z / (2 * num_trials)) ** 2) / scale
    # for no right ones, and for all, middle and half are equal up to rounding
    return Interval(0.0 if num_right == 0 else middle - half, 1.0 if num_right == num_trials else middle + half)


def resampled_means(values: FloatArray, *, num_resamples: int, seed: int) -> FloatArray:
    """Computes means over problems drawn with replacement, `[num_resamples, ...]` of values `[problems, ...]`.

    Calls with the same seed and number of problems draw the same problems, so columns and calls are paired.
    """
    return resample_counts(len(values), num_resamples, seed) @ values / len(values)


@lru_cache(maxsize=4)  # the rows of a study are all over the same problems
def resample_counts(num_problems: int, num_resamples: int, seed: int) -> FloatArray:
    """Draws problems with replacement, and counts each: `[num_resamples, num_problems]`, read-only.

    A row sums to `num_problems`.
    """
    rng = np.random.default_rng([seed, num_problems])
    share = np.full(num_problems, 1 / num_problems)
    counts = rng.multinomial(num_problems, share, num_resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def mean_interval(
    values: Sequence[float] | FloatArray, *, level: float = 0.95, num_resamples: int = 4000, seed: int = 0
) -> Interval:
    """Computes the BCa interval of the mean accuracy over problems.

    Args:
        values: `[problems]` in [0, 1]: right or wrong, or a share of right chains.

    Raises:
        ValueError: there are no values, or one is outside of [0, 1].
    """
    values = _checked(values, "values", 0.0)
    if (values == values[0]).all():  # of shares, no wider than of as many wholes right and wrong
        return wilson(float(values[0]) * len(values), len(values), level=level)
    return bca_interval(values, level, num_resamples, seed)


def paired_difference(
    first: Sequence[float] | FloatArray,
    second: Sequence[float] | FloatArray,
    *,
    level: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Difference:
    """Computes the mean of `first - second` over the same problems, with its BCa interval.

    Where the two agree on every problem, the share on which they differ is below Wilson's upper bound for none, and the
    interval is that wide to both sides.

    Raises:
        ValueError: the lengths differ, there are no values, or one is outside of [0, 1].
    """
    one, other = _checked(first, "first", 0.0), _checked(second, "second", 0.0)
    if len(one) != len(other):
        raise ValueError(f"second: expected {len(one)} values, those of the same problems, got {len(other)}")
    return difference_of(one - other, level=level, num_resamples=num_resamples, seed=seed)


def difference_of(
    differences: FloatArray, *, level: float = 0.95, num_resamples: int = 4000, seed: int = 0
) -> Difference:
    """Computes `paired_difference` from the differences `[problems]`, in [-1, 1].

    Raises:
        ValueError: there are none, or one is outside of [-1, 1].
    """
    differences = _checked(differences, "differences", -1.0)
    mean = float(differences.mean())
    if (differences == differences[0]).all():
        slack = wilson(0, len(differences), level=level).high
        return Difference(mean, max(mean - slack, -1.0), min(mean + slack, 1.0))
    return Difference(mean, *bca_interval(differences, level, num_resamples, seed))


def bca_interval(values: FloatArray, level: float = 0.95, num_resamples: int = 4000, seed: int = 0) -> Interval:
    """Computes the bias-corrected, accelerated bootstrap interval of the mean of values `[problems]`, not all equal."""
    mean, centred = values.mean(), values - values.mean()
    means = np.sort(resampled_means(values, num_resamples=num_resamples, seed=seed))
    # Resampled means of zeros and ones often equal the estimate: ties count half, or they would count as bias.
    ulps = 8 * np.finfo(np.float64).eps
    below = np.count_nonzero(means < mean - ulps) + np.count_nonzero(np.abs(means - mean) <= ulps) / 2
    bias = NormalDist().inv_cdf(min(max(below, 0.5), num_resamples - 0.5) / num_resamples)
    # the jackknife's, which has a closed form for a mean
    acceleration = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    z = _z_score(level)
    ends = []
    for shift in (bias - z, bias + z):
        share = NormalDist().cdf(bias + shift / (1 - acceleration * shift))
        ends.append(float(np.quantile(means, share)))
    return Interval(*ends)


def _checked(values: Sequence[float] | FloatArray, name: str, low: float) -> FloatArray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name}: expected one value for each problem, got the shape {list(array.shape)}")
    ulps = 8 * np.finfo(np.float64).eps  # a share of chains may be a few ulps off
    if not ((array >= low - ulps) & (array <= 1 + ulps)).all():
        raise ValueError(f"{name}: expected values from {low:g} to 1, got {array.min():g} to {array.max():g}")
    return array.clip(low, 1.0)


def _z_score(level: float) -> float:
    """Returns the number of standard deviations around the mean that hold `level` of a normal distribution."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
