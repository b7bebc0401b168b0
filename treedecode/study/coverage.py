"""Coverage: the chance that at least one of k chains is right.

It is estimated without bias from n chains (2107.03374), as a power law of k (2407.21787), and from a Beta distribution
of the problems' success rates (2502.17578), which also predicts it for more chains than were sampled.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaln, psi

from treedecode.common.arrays import FloatArray
from treedecode.common.intervals import Interval, resample_counts
from treedecode.study.laws import CannotFit

_LOG_STRENGTH = (np.log(1e-3), np.log(1e4))  # of alpha + beta; beyond, rates are 0 and 1, or all the same
_LOGIT_MEAN = (-14.0, 14.0)


def pass_at_k(num_chains: int, num_right: np.ndarray, k: int) -> FloatArray:
    """Estimates, without bias, the chance that one of `k` chains is right.

    The estimate 1 - C(n - c, k) / C(n, k) is computed as a product of k ratios below 1, without factorials.

    Args:
        num_right: `[problems]` right chains of `num_chains`.

    Returns:
        `[problems]`.

    Raises:
        ValueError: k or a count is out of range.
    """
    num_right = np.asarray(num_right)
    if not 1 <= k <= num_chains:
        raise ValueError(f"k: expected from 1 to {num_chains}, the chains there are, got {k}")
    if ((num_right < 0) | (num_right > num_chains)).any():
        raise ValueError(f"num_right: expected from 0 to {num_chains}, got {num_right.tolist()}")
    drawn = np.arange(k)
    wrong = (num_chains - num_right[:, None] - drawn).clip(min=0)
    return 1 - (wrong / (num_chains - drawn)).prod(axis=1)


@dataclass(frozen=True)
class BetaBinomial:
    """A Beta(alpha, beta) distribution of success rates, fitted by maximum likelihood to counts of right chains.

    Attributes:
        intervals: of alpha and beta, percentiles over resampled problems.
        log_likelihood: per problem, nats, without the binomial coefficients, which do not depend on the fit.
    """

    alpha: float
    beta: float
    intervals: dict[str, Interval]
    log_likelihood: float

    def pass_at_k(self, k: np.ndarray) -> FloatArray:
        """Computes the chance that one of k chains is right: 1 - B(alpha, beta + k) / B(alpha, beta)."""
        return -np.expm1(betaln(self.alpha, self.beta + k) - betaln(self.alpha, self.beta))

    def to_json(self) -> dict[str, Any]:
        """Returns `{"formula", "parameters", "intervals", "log_likelihood"}`."""
        return {
            "formula": "success rates ~ Beta(alpha, beta)",
            "parameters": {"alpha": self.alpha, "beta": self.beta},
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "log_likelihood": self.log_likelihood,
        }


def fit_beta_binomial(
    num_chains: int, num_right: np.ndarray, *, num_resamples: int = 300, level: float = 0.95, seed: int = 0
) -> BetaBinomial:
    """Fits `BetaBinomial` to counts `[problems]` of right chains out of `num_chains`.

    Raises:
        CannotFit: there is one chain, all chains are alike, or no Beta distribution explains the spread of counts.
        ValueError: a count is out of range.
    """
    num_right = np.asarray(num_right)
    if len(num_right) == 0 or ((num_right < 0) | (num_right > num_chains)).any():
        raise ValueError(f"num_right: expected counts from 0 to {num_chains}, got {num_right.tolist()}")
    if num_chains < 2:
        raise CannotFit("one chain of a problem says nothing of how problems differ; at least 2 are needed")
    for count, word in ((0, "wrong"), (num_chains, "right")):
        if (num_right == count).all():
            raise CannotFit(f"every chain of every problem is {word}")
    if np.isin(num_right, (0, num_chains)).all():
        raise CannotFit(
            "of every problem all chains are right or all are wrong, so its rate is only known to be extreme"
        )
    counts = np.arange(num_chains + 1)
    (logit, log_strength), value = _maximise(counts, np.bincount(num_right, minlength=num_chains + 1))
    if log_strength > _LOG_STRENGTH[1] - 1e-3:
        raise CannotFit(
            "counts of right chains differ no more than chance makes them, so all problems are equally hard"
        )
    resamples = resample_counts(len(num_right), num_resamples, seed)
    histograms = resamples @ (num_right[:, None] == counts)
    fits = [_parameters(*_maximise(counts, histogram)[0]) for histogram in histograms if histogram[1:-1].any()]
    alpha, beta = _parameters(logit, log_strength)
    low, high = np.quantile(fits, [(1 - level) / 2, (1 + level) / 2], axis=0)
    intervals = {"alpha": Interval(*map(float, (low[0], high[0]))), "beta": Interval(*map(float, (low[1], high[1])))}
    return BetaBinomial(alpha, beta, intervals, value)


def _maximise(counts: np.ndarray, histogram: np.ndarray) -> tuple[tuple[float, float], float]:
    """(logit of the mean rate, log(alpha + beta)) of the highest likelihood, and that per problem, nats.

    Args:
        histogram: `[num_chains + 1]`, how many problems have so many right chains.
    """
    num_chains, total = counts[-1], histogram.sum()
    share = float(histogram @ counts / (total * num_chains))

    def loss(params: FloatArray) -> tuple[float, FloatArray]:
        mean = 1 / (1 + np.exp(-params[0]))
        strength = np.exp(params[1])
        alpha, beta = mean * strength, (1 - mean) * strength
        value = betaln(counts + alpha, num_chains - counts + beta) - betaln(alpha, beta)
        both = psi(strength) - psi(num_chains + strength)
        by_alpha = psi(counts + alpha) - psi(alpha) + both
        by_beta = psi(num_chains - counts + beta) - psi(beta) + both
        by_logit = (by_alpha - by_beta) * strength * mean * (1 - mean)
        by_strength = by_alpha * alpha + by_beta * beta
        return -(histogram @ value) / total, -np.array([histogram @ by_logit, histogram @ by_strength]) / total

    start = (np.log(share / (1 - share)), 0.0)
    result = minimize(loss, start, jac=True, bounds=(_LOGIT_MEAN, _LOG_STRENGTH), method="L-BFGS-B")
    return (float(result.x[0]), float(result.x[1])), -float(result.fun)


def _parameters(logit: float, log_strength: float) -> tuple[float, float]:
    mean, strength = 1 / (1 + np.exp(-logit)), np.exp(log_strength)
    return float(mean * strength), float((1 - mean) * strength)
