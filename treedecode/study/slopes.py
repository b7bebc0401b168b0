"""Slopes of a curve of accuracy against compute, as measured, and where it saturates. No law is needed for either."""

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
    """The local slopes of a curve, as measured, without a law; budgets of equal cost have none between them."""
    found = []
    for j in range(len(curve.costs) - 1):
        low, high = curve.costs[j : j + 2]
        if high > low:
            gain = difference_of(curve.accuracy[:, j + 1] - curve.accuracy[:, j], level=level, seed=seed)
            per_doubling = Difference(*(value / float(np.log2(high / low)) for value in gain))
            found.append(Slope(float(low), float(high), per_doubling))
    return found


def saturation(found: list[Slope]) -> float | None:
    """The smallest cost beyond which no budget gained measurably on the one before: all later intervals include 0.

    None where the last budget gained measurably, or there are no slopes.
    """
    at = None
    for slope in reversed(found):
        if slope.per_doubling.low > 0:
            break
        at = slope.low_cost
    return at
