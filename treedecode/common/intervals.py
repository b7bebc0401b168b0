"""Intervals of accuracies and of their differences, over problems.

Problems are the sample: a strategy's correctness on each of them is one draw, and two strategies, or two policies of
allocation, are compared on the same ones. Intervals are BCa bootstrap intervals (Efron, 1987, "Better Bootstrap
Confidence Intervals"), as accuracies lie near 0 or 1 often enough for the percentile method to be off on the skewed
side. Where a bootstrap has nothing to resample, because all problems went alike, the interval is Wilson's (1927),
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
    """The score interval of a proportion.

    Raises:
        ValueError: no trials, or more right than there are trials.
    """
    if num_trials < 1:
        raise ValueError(f"num_trials: expected at least 1, got {num_trials}")
    if not 0 <= num_right <= num_trials:
        raise ValueError(f"num_right: expected from 0 to {num_trials}, got {num_right}")
    z, share = _quantile(_level(level)), num_right / num_trials
    scale = 1 + z * z / num_trials
    middle = (share + z * z / (2 * num_trials)) / scale
    half = z * math.sqrt(share * (1 - share) / num_trials + (z / (2 * num_trials)) ** 2) / scale
    # at the ends middle and half are equal, but for rounding
    return Interval(0.0 if num_right == 0 else middle - half, 1.0 if num_right == num_trials else middle + half)


def resampled_means(values: FloatArray, *, num_resamples: int, seed: int) -> FloatArray:
    """Means over problems drawn again with replacement, `[num_resamples, ...]` of values `[problems, ...]`.

    The same problems are drawn for the same seed and number of problems, so that the columns, and other calls, are
    paired.
    """
    return draws(len(values), num_resamples, seed) @ values / len(values)


@lru_cache(maxsize=4)  # the rows of a study are all over the same problems
def draws(num_problems: int, num_resamples: int, seed: int) -> FloatArray:
    """How often each problem is drawn, `[num_resamples, num_problems]`, read-only; rows sum to `num_problems`."""
    rng = np.random.default_rng([seed, num_problems])
    share = np.full(num_problems, 1 / num_problems)
    counts = rng.multinomial(num_problems, share, num_resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def mean_interval(
    values: Sequence[float] | FloatArray, *, level: float = 0.95, num_resamples: int = 4000, seed: int = 0
) -> Interval:
    """The BCa interval of the mean of an accuracy per problem.

    Args:
        values: `[problems]` in [0, 1]: right or wrong, or a share of right chains.

    Raises:
        ValueError: no values, or one outside of [0, 1].
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
    """The mean of `first - second` over the same problems, with its BCa interval.

    Where the two agree on every problem, the share of problems on which they do not is known to be below Wilson's upper
    bound for none, and the interval is that wide to both sides.

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
    """`paired_difference`, of differences `[problems]` in [-1, 1] that have been taken already.

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
    """The bias-corrected and accelerated bootstrap interval of the mean of values `[problems]`, not all equal."""
    mean, centred = values.mean(), values - values.mean()
    means = np.sort(resampled_means(values, num_resamples=num_resamples, seed=seed))
    # Means of 0 and 1 are often equal to the estimate: ties count half, or the correction would be for them.
    ulps = 8 * np.finfo(np.float64).eps
    below = np.count_nonzero(means < mean - ulps) + np.count_nonzero(np.abs(means - mean) <= ulps) / 2
    bias = _quantile_at(min(max(below, 0.5), num_resamples - 0.5) / num_resamples)
    # of the jackknife, which for a mean has a closed form
    acceleration = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    z = _quantile(_level(level))
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


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    return level


def _quantile(level: float) -> float:
    return _quantile_at((1 + level) / 2)


def _quantile_at(share: float) -> float:
    return NormalDist().inv_cdf(share)
