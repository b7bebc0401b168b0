"""Intervals of an audit's gaps, and corrected p-values of several tests."""

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Computes the 95% percentile interval of a statistic over problems resampled with replacement (Efron, 1979).

    It is for statistics that are no means and may not exist. The BCa intervals of `treedecode.common.intervals`, which
    are for means, cover the truth of an audit's gaps less often (measured: `docs/decisions/allocation.md`).

    Args:
        statistic: computes it of the problems with given indices `[count]`; nan = it does not exist, and is left out.
        count: number of problems.
        seed: of the resampling; statistics with the same seed see the same problems.

    Returns:
        both ends; nan where the statistic never exists.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects the p-values of several tests (Holm, 1979).

    P(any corrected value is below a level by chance) is at most that level, however the tests depend on one another. A
    nan is no test, and stays.
    """
    p = np.asarray(p_values, np.float64)
    corrected = np.full(len(p), np.nan)
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return corrected.tolist()
