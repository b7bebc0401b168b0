"""Measures the slopes of a curve of accuracy against compute, and the cost at which it saturates, without a law."""

from dataclasses import dataclass

import numpy as np

from treedecode.common.intervals import Difference, difference_of
from treedecode.study.laws import Curve


@dataclass(frozen=True)
class Slope:
    """Accuracy gained per doubling of compute between two neighbouring budgets, with its interval over problems."""

    low_cost: float
    high_cost: float
    per_doubling: Difference


def slopes(curve: Curve, *, level: float = 0.95, seed: int = 0) -> list[Slope]:
    """Measures the slopes between neighbouring budgets of a curve; budgets of equal cost have none between them."""
    results = []
    for j in range(len(curve.costs) - 1):
        low, high = curve.costs[j : j + 2]
        if high > low:
            gain = difference_of(curve.accuracy[:, j + 1] - curve.accuracy[:, j], level=level, seed=seed)
            per_doubling = Difference(*(value / float(np.log2(high / low)) for value in gain))
            results.append(Slope(float(low), float(high), per_doubling))
    return results


def saturation(curve_slopes: list[Slope]) -> float | None:
    """Returns the smallest cost after which no budget gained measurably: the intervals of all later slopes include 0.

    None where the last budget gained measurably, or there are no slopes.
    """
    cost = None
    for slope in reversed(curve_slopes):
        if slope.per_doubling.low > 0:
            break
        cost = slope.low_cost
    return cost
