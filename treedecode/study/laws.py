"""Laws of accuracy against compute: fits them by likelihood, and compares how well they predict.

The data are shares of right answers per problem and budget. Every law is fitted by the same quasi-binomial likelihood,
which takes shares that are no whole numbers, so that laws differ in their shape alone. All budgets are of the same
problems, so their errors are correlated, which a likelihood of independent points ignores. Intervals are therefore
percentiles of fits to resampled problems.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from treedecode.common.arrays import FloatArray
from treedecode.common.intervals import Difference, Interval, bca_interval, resample_counts, wilson

_MAX_STEPS = 300


class CannotFit(ValueError):
    """The data do not determine the parameters; the message says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"cannot be fitted: {reason}")


@dataclass(frozen=True)
class Curve:
    """Accuracy of a strategy at several budgets, over the same problems.

    Attributes:
        costs: `[m]` ascending: compute in multiples of the baseline's, or numbers of chains.
        accuracy: `[problems, m]`, shares of right answers.

    Raises:
        ValueError: shapes do not fit, a cost is not positive, costs descend, or a share is outside of [0, 1].
    """

    costs: FloatArray
    accuracy: FloatArray

    def __post_init__(self) -> None:
        if self.accuracy.ndim != 2 or self.costs.shape != self.accuracy.shape[1:] or self.accuracy.size == 0:
            raise ValueError(
                f"accuracy: expected [problems, {len(self.costs)}], one column per cost, got {self.accuracy.shape}"
            )
        if not (self.costs > 0).all() or not np.isfinite(self.costs).all() or (np.diff(self.costs) < 0).any():
            raise ValueError(f"costs: expected ascending numbers above 0, got {self.costs.tolist()}")
        if not ((self.accuracy >= 0) & (self.accuracy <= 1 + 1e-12)).all():
            raise ValueError("accuracy: expected shares from 0 to 1")

    @property
    def means(self) -> FloatArray:
        """`[m]` accuracies over all problems."""
        return self.accuracy.mean(axis=0)


@dataclass(frozen=True)
class Law:
    """A family of curves.

    Attributes:
        name, formula: for people; C is the cost.
        names: of the parameters as reported.
        bounds: of the parameters as fitted; every point of this box gives probabilities at all costs.
        starts: points of the box to start from.
        predict: (fitted parameters `[..., p]`, costs `[m]`, reference costs `[2]`) -> accuracies `[..., m]` and their
            derivatives `[..., p, m]`. The reference costs are the lowest and the highest of the data.
        report: (fitted parameters `[..., p]`, reference costs) -> parameters as reported, `[..., p]`.
        is_flat: (fitted parameters `[..., p]`) -> true where compute does not raise the curve, so that other parameters
            have no meaning.
        bounded: those of `names` that are fitted as they are reported, so that the bounds of the box are theirs.
    """

    name: str
    formula: str
    names: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    starts: tuple[tuple[float, ...], ...]
    predict: Callable[[FloatArray, FloatArray, FloatArray], tuple[FloatArray, FloatArray]]
    report: Callable[[FloatArray, FloatArray], FloatArray]
    is_flat: Callable[[FloatArray], np.ndarray]
    bounded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """A law fitted to a curve.

    Attributes:
        parameters, intervals: by name, as the law reports them. A parameter at a bound of its law has no interval
            (None): the data do not determine it, and resampled fits that stop at the same bound say nothing of it.
        log_likelihood: per problem and budget, nats.
        flat_share: the share of fits to resampled problems in which compute did not raise accuracy.
        fitted: `[p]` fitted parameters.
        resampled: `[resamples, p]` parameters fitted to resampled problems.
        ends: `[2]` reference costs.
    """

    law: Law
    parameters: dict[str, float]
    intervals: dict[str, Interval | None]
    log_likelihood: float
    flat_share: float
    fitted: FloatArray
    resampled: FloatArray
    ends: FloatArray

    def accuracy(self, costs: FloatArray) -> FloatArray:
        """Predicts accuracies at costs `[m]`."""
        return self.law.predict(self.fitted, costs, self.ends)[0]

    def band(self, costs: FloatArray, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Computes the pointwise interval of predicted accuracies at costs `[m]`, over resampled problems."""
        curves = self.law.predict(self.resampled, costs, self.ends)[0]
        return np.quantile(curves, (1 - level) / 2, axis=0), np.quantile(curves, (1 + level) / 2, axis=0)

    def to_json(self) -> dict[str, Any]:
        """Returns `{"formula", "parameters", "intervals", "log_likelihood", "flat_share"}`; None = no interval."""
        return {
            "formula": self.law.formula,
            "parameters": self.parameters,
            "intervals": {name: ends and list(ends) for name, ends in self.intervals.items()},
            "log_likelihood": self.log_likelihood,
            "flat_share": self.flat_share,
        }


def _power(params: FloatArray, costs: FloatArray, ends: FloatArray) -> tuple[FloatArray, FloatArray]:
    # error = floor + part * (1 - floor) * x^-b with x >= 1: a probability for every point of the box
    floor, part, b = _columns(params)
    log_x = np.log(costs / ends[0])
    decay = np.exp(-b * log_x)
    grad = [1 - part * decay, (1 - floor) * decay, -part * (1 - floor) * decay * log_x]
    return 1 - floor - part * (1 - floor) * decay, -np.stack(grad, axis=-2)


def _report_power(params: FloatArray, ends: FloatArray) -> FloatArray:
    floor, part, b = np.moveaxis(params, -1, 0)
    return np.stack([floor, part * (1 - floor) * ends[0] ** b, b], axis=-1)


def _logistic(params: FloatArray, costs: FloatArray, ends: FloatArray) -> tuple[FloatArray, FloatArray]:
    a, k = _columns(params)
    log_c = np.log(costs)
    accuracy = 1 / (1 + np.exp(-(a + k * log_c).clip(-700, 700)))
    slope = accuracy * (1 - accuracy)
    return accuracy, np.stack([slope, slope * log_c], axis=-2)


def _log_linear(params: FloatArray, costs: FloatArray, ends: FloatArray) -> tuple[FloatArray, FloatArray]:
    # fitted by its values at both ends of the data, so that all between are probabilities; cut off beyond
    low, high = _columns(params)
    weight = np.log(costs / ends[0]) / np.log(ends[1] / ends[0])
    accuracy = low * (1 - weight) + high * weight
    inside = (accuracy >= 0) & (accuracy <= 1)
    return accuracy.clip(0, 1), np.stack([(1 - weight) * inside, weight * inside], axis=-2)


def _report_log_linear(params: FloatArray, ends: FloatArray) -> FloatArray:
    low, high = np.moveaxis(params, -1, 0)
    slope = (high - low) / np.log2(ends[1] / ends[0])
    return np.stack([low - slope * np.log2(ends[0]), slope], axis=-1)


def _coverage(params: FloatArray, costs: FloatArray, ends: FloatArray) -> tuple[FloatArray, FloatArray]:
    log_a, b = _columns(params)
    log_x = np.log(costs / ends[0])
    exponent = np.exp(log_a - b * log_x)
    accuracy = np.exp(-exponent)
    return accuracy, np.stack([-accuracy * exponent, accuracy * exponent * log_x], axis=-2)


def _report_coverage(params: FloatArray, ends: FloatArray) -> FloatArray:
    log_a, b = np.moveaxis(params, -1, 0)
    return np.stack([np.exp(log_a) * ends[0] ** b, b], axis=-1)


def _columns(params: FloatArray) -> FloatArray:
    """Returns parameters one by one, `[p, ..., 1]`, to be broadcast against costs on the last axis."""
    return np.moveaxis(params, -1, 0)[..., None]


POWER = Law(
    name="power",
    formula="error = E_inf + A * C^-b",
    names=("E_inf", "A", "b"),
    bounds=((0, 1), (0, 1), (1e-3, 8)),
    starts=((0.05, 0.8, 0.3), (0.3, 0.5, 1.5)),
    predict=_power,
    report=_report_power,
    is_flat=lambda params: ((1 - params[..., 0]) * params[..., 1] < 1e-4) | (params[..., 2] <= 1e-3),
    bounded=("E_inf", "b"),
)
LOGISTIC = Law(
    name="logistic",
    formula="accuracy = 1 / (1 + exp(-(a + k * ln C)))",
    names=("a", "k"),
    bounds=((-40, 40), (-40, 40)),
    starts=((0, 0.3),),
    predict=_logistic,
    report=lambda params, ends: params,
    is_flat=lambda params: params[..., 1] <= 0,
    bounded=("a", "k"),
)
LOG_LINEAR = Law(
    name="log-linear",
    formula="accuracy = a + k * log2 C, cut off at 0 and 1",
    names=("a", "k"),
    bounds=((0, 1), (0, 1)),
    starts=((0.4, 0.6),),
    predict=_log_linear,
    report=_report_log_linear,
    is_flat=lambda params: params[..., 1] <= params[..., 0],
)
COVERAGE = Law(
    name="coverage",
    formula="-ln(pass@k) = a * k^-b",
    names=("a", "b"),
    bounds=((-20, 4), (0, 8)),
    starts=((0, 0.3), (-1, 1)),
    predict=_coverage,
    report=_report_coverage,
    is_flat=lambda params: params[..., 1] <= 0,
    bounded=("b",),
)
LAWS = (POWER, LOGISTIC, LOG_LINEAR)


def fit(law: Law, curve: Curve, *, num_resamples: int = 300, level: float = 0.95, seed: int = 0) -> Fit:
    """Fits a law to a curve, and to curves of resampled problems for the parameters' intervals.

    Raises:
        CannotFit: there are too few budgets, or all answers are alike; or compute does not raise accuracy, and the
            law's parameters mean nothing then.
    """
    _require(curve, len(law.names))
    ends = curve.costs[[0, -1]]
    (fitted,), (value,) = _maximise(law, curve.costs, curve.means[None], law.starts)
    if law in (POWER, COVERAGE) and law.is_flat(fitted):
        raise CannotFit("accuracy does not rise with compute, so nothing tells what it would rise to, or how fast")
    num_problems = len(curve.accuracy)
    means = resample_counts(num_problems, num_resamples, seed) @ curve.accuracy / num_problems
    resampled, _ = _maximise(law, curve.costs, means, (tuple(fitted), *law.starts))
    shares = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(law.report(resampled, ends), shares, axis=0)
    intervals: dict[str, Interval | None] = {
        name: None if _is_at_bound(law, name, fitted) else Interval(float(a), float(b))
        for name, a, b in zip(law.names, low, high, strict=True)
    }
    return Fit(
        law=law,
        parameters=dict(zip(law.names, law.report(fitted, ends).tolist(), strict=True)),
        intervals=intervals,
        log_likelihood=float(value),
        flat_share=float(law.is_flat(resampled).mean()),
        fitted=fitted,
        resampled=resampled,
        ends=ends,
    )


def _is_at_bound(law: Law, name: str, fitted: FloatArray) -> bool:
    if name not in law.bounded:
        return False
    i = law.names.index(name)
    low, high = law.bounds[i]
    return not low + 1e-6 * (high - low) < fitted[i] < high - 1e-6 * (high - low)


@dataclass(frozen=True)
class HeldOut:
    """The quality of a law's predictions for budgets that it was not fitted to.

    Attributes:
        log_likelihood: per problem and budget left out, nats.
        behind: the best law's log-likelihood minus this one's, with its interval over problems; None for the best.
    """

    law: str
    log_likelihood: float
    behind: Difference | None


def compare(curve: Curve, laws: tuple[Law, ...] = LAWS, *, seed: int = 0) -> list[HeldOut]:
    """Leaves one budget out at a time and predicts it from the others; the best law comes first.

    Raises:
        CannotFit: there are too few budgets, or all answers are alike.
    """
    _require(curve, 1 + max(len(law.names) for law in laws))
    num_problems, num_costs = curve.accuracy.shape
    # n problems cannot tell smaller probabilities from 0; a law that rules out what happened loses -log of this
    min_probability = 1 / (2 * (num_problems + 1))
    scores = np.empty((len(laws), num_problems))
    for i, law in enumerate(laws):
        log_likelihoods = np.empty((num_problems, num_costs))
        for j in range(num_costs):
            rest = np.delete(np.arange(num_costs), j)
            (params,), _ = _maximise(law, curve.costs[rest], curve.means[None, rest], law.starts)
            expected = law.predict(params, curve.costs[[j]], curve.costs[rest][[0, -1]])[0]
            expected = expected.clip(min_probability, 1 - min_probability)
            log_likelihoods[:, j] = _log_likelihoods(curve.accuracy[:, j], expected)
        scores[i] = log_likelihoods.mean(axis=1)
    order = np.argsort(-scores.mean(axis=1), kind="stable")
    best = scores[order[0]]

    def behind(i: int) -> Difference | None:
        lead = best - scores[i]
        if i == order[0]:
            return None
        mean = float(lead.mean())
        if np.ptp(lead) > 1e-12:
            return Difference(mean, *bca_interval(lead, seed=seed))
        # All leads are equal, so there is nothing to resample. Problems of another kind may be as frequent as Wilson's
        # bound for none seen, with leads between the logarithms of `min_probability` and its inverse.
        rare = wilson(0, num_problems).high
        middle, half = (1 - rare) * mean, -rare * float(np.log(min_probability))
        return Difference(mean, middle - half, middle + half)

    return [HeldOut(laws[i].name, float(scores[i].mean()), behind(int(i))) for i in order]


def _require(curve: Curve, num_costs: int) -> None:
    distinct = len(np.unique(curve.costs))
    if distinct < num_costs:
        raise CannotFit(f"{distinct} different budgets, and at least {num_costs} are needed")
    means = curve.means
    for value, word in ((0.0, "wrong"), (1.0, "right")):
        if np.allclose(means, value, rtol=0, atol=1e-12):
            raise CannotFit(f"every problem is {word} at every budget")


def _maximise(
    law: Law, costs: FloatArray, means: FloatArray, starts: tuple[tuple[float, ...], ...]
) -> tuple[FloatArray, FloatArray]:
    """Fits a law to `r` curves by Fisher scoring with Levenberg's damping, from all starts at once.

    A parameter at its bound that the likelihood pulls further stays there for that step.

    Args:
        means: `[r, m]` accuracies.

    Returns:
        the parameters `[r, p]` of the highest likelihoods within the law's box, and the mean log-likelihoods over costs
        `[r]`, nats.
    """
    ends, (low, high) = costs[[0, -1]], np.array(law.bounds, np.float64).T
    params = np.tile(np.array(starts, np.float64), (len(means), 1)).clip(low, high)
    means = np.repeat(means, len(starts), axis=0)
    eye, damping = np.eye(len(low)), np.full(len(params), 1e-3)
    value, pull, metric = _scores(law, params, costs, means, ends)
    for _ in range(_MAX_STEPS):
        held = ((params <= low) & (pull < 0)) | ((params >= high) & (pull > 0))
        scale = damping[:, None] * (np.einsum("rii->ri", metric) + 1e-12)
        free = metric + eye * scale[:, None, :]
        free = np.where(held[:, :, None] | held[:, None, :], eye, free)
        step = np.linalg.solve(free, np.where(held, 0.0, pull)[..., None])[..., 0]
        tried = (params + step).clip(low, high)
        new = _scores(law, tried, costs, means, ends)
        gain = new[0] - value
        better = gain > 0
        params[better], value[better], pull[better], metric[better] = tried[better], *(part[better] for part in new)
        damping = np.where(better, damping / 5, damping * 5).clip(1e-12, 1e12)
        if (better & (gain < 1e-13) | (damping > 1e10)).all():
            break
    best = value.reshape(-1, len(starts)).argmax(axis=1) + np.arange(0, len(params), len(starts))
    return params[best], value[best]


def _scores(
    law: Law, params: FloatArray, costs: FloatArray, means: FloatArray, ends: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Computes mean log-likelihoods `[r]`, their gradients `[r, p]` and Fisher information `[r, p, p]`."""
    expected, grad = law.predict(params, costs, ends)
    expected = expected.clip(1e-9, 1 - 1e-9)
    weights = 1 / (expected * (1 - expected) * len(costs))
    pull = np.einsum("rpm,rm->rp", grad, (means - expected) * weights)
    metric = np.einsum("rpm,rm,rqm->rpq", grad, weights, grad)
    return _log_likelihoods(means, expected).mean(axis=1), pull, metric


def _log_likelihoods(accuracy: FloatArray, expected: FloatArray) -> FloatArray:
    return accuracy * np.log(expected) + (1 - accuracy) * np.log1p(-expected)
