"""Calibration of probabilities: isotonic regression, and measures of its error."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Isotonic:
    """A non-decreasing function that is linear between knots, and constant beyond them.

    Attributes:
        x, y: `[k]` float64, both non-decreasing.
    """

    x: np.ndarray
    y: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.interp(values, self.x, self.y)


def fit_isotonic(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> Isotonic:
    """Fits the non-decreasing function of `x` with the least weighted squared error to `y`.

    Pool adjacent violators (Ayer et al., 1955): neighbours in the wrong order become a block with their mean. Each
    block's two ends are knots.

    Args:
        x, y, weights: `[n]`; weights are > 0, by default 1.

    Raises:
        ValueError: there is nothing to fit.
    """
    if len(x) == 0:
        raise ValueError("x: is empty; there is nothing to calibrate on")
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    positions, index = np.unique(x, return_inverse=True)  # equal x have one value
    mass = np.bincount(index, weights)
    means = np.bincount(index, weights * y) / mass
    blocks: list[tuple[float, float, int]] = []  # mean, mass, number of positions
    for mean, weight in zip(means.tolist(), mass.tolist(), strict=True):
        count = 1
        while blocks and blocks[-1][0] >= mean:
            other_mean, other_weight, other_count = blocks.pop()
            mean = (mean * weight + other_mean * other_weight) / (weight + other_weight)
            weight, count = weight + other_weight, count + other_count
        blocks.append((mean, weight, count))
    ends = np.cumsum([count for _, _, count in blocks])
    begins = ends - [count for _, _, count in blocks]
    knots = np.stack([positions[begins], positions[ends - 1]], axis=1).ravel()
    values = np.repeat([mean for mean, _, _ in blocks], 2)
    keep = np.r_[True, (np.diff(knots) > 0) | (np.diff(values) > 0)]  # a block of one has one knot
    return Isotonic(knots[keep], values[keep])


def expected_calibration_error(
    predicted: np.ndarray, happened: np.ndarray, weights: np.ndarray | None = None, *, num_bins: int = 15
) -> float:
    """Computes the mean over bins of |mean prediction - share that happened|.

    Bins hold equal numbers of predictions, as far as equal predictions allow.

    Args:
        predicted: `[n]` probabilities.
        happened: `[n]` outcomes, or shares of them.
        weights: `[n]` of the outcomes.
    """
    weights = np.ones(len(predicted)) if weights is None else np.asarray(weights, np.float64)
    order = np.argsort(predicted, kind="stable")
    # equal predictions stay together, or their order would decide which of them are in a bin
    rank = np.searchsorted(predicted[order], predicted)
    bins = rank * min(num_bins, len(predicted)) // len(predicted)
    gaps = np.bincount(bins, weights * (predicted - happened))
    return float(np.abs(gaps).sum() / weights.sum())


def auc(predicted: np.ndarray, happened: np.ndarray) -> float:
    """Computes P(an outcome that happened was predicted above one that did not), ties half; nan where all are alike."""
    happened = np.asarray(happened, bool)
    _, index, tied = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(tied) - (tied - 1) / 2)[index]
    wins, losses = int(happened.sum()), int((~happened).sum())
    if not wins or not losses:
        return float("nan")
    return float((ranks[happened].sum() - wins * (wins + 1) / 2) / (wins * losses))
