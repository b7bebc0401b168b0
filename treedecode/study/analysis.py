"""Computes curves and laws from the rows of a study and its pool of chains."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from treedecode.common.arrays import FloatArray
from treedecode.common.intervals import mean_interval
from treedecode.study import coverage, pool
from treedecode.study.laws import COVERAGE, LAWS, CannotFit, Curve, compare, fit
from treedecode.study.pool import PooledChains
from treedecode.study.slopes import saturation, slopes

Json = dict[str, Any]


def pool_sizes(num_chains: int) -> list[int]:
    """Returns 1, 2, 4, ... up to the size of the pool."""
    return [1 << i for i in range(num_chains.bit_length())]


def curves_of(pools: Sequence[PooledChains], chain_tokens: float, pool_tokens: float, seed: int) -> dict[str, Curve]:
    """Computes the curves of a pool, by name; costs are tokens in multiples of the baseline's.

    Args:
        chain_tokens: of the baseline, per problem.
        pool_tokens: generated per problem for the pool, those for its scores too.
    """
    num_chains = len(pools[0].right)
    counts = pool_sizes(num_chains)
    sampled = float(np.mean([chains.tokens.sum() for chains in pools])) / num_chains
    majority = pool.curve(pools, counts, "majority", seed=seed)
    curves = {"self_consistency": Curve(np.array(counts) * sampled / chain_tokens, majority)}
    if not any(np.isnan(chains.scores).any() for chains in pools):
        scored = pool_tokens / num_chains
        curves["best_of_n"] = Curve(np.array(counts) * scored / chain_tokens, pool.curve(pools, counts, "best"))
    return curves


def row_curves(rows: Sequence[Json]) -> dict[str, Curve]:
    """Computes the curves whose budgets are rows of their own, by name.

    They begin with the baseline, the first row: with one chain to spend there is nothing to choose, so it is the
    smallest budget of every such strategy.
    """
    succeeded = [row for row in rows if row["error"] is None]
    curves = {}
    for name in dict.fromkeys(row["curve"] for row in succeeded if row["curve"]):
        members = [rows[0], *(row for row in succeeded if row["curve"] == name)]
        members.sort(key=lambda row: row["tokens_x"])
        accuracy = np.array([row["correct"] for row in members], np.float64).T
        curves[name] = Curve(np.array([row["tokens_x"] for row in members], np.float64), accuracy)
    return curves


def laws_of(curve: Curve, *, num_resamples: int, seed: int) -> Json:
    """Analyses a curve: its points, fitted laws, their order by held-out likelihood, slopes and saturation."""
    data: Json = {"points": points(curve), "fits": {}}
    for law in LAWS:
        data["fits"][law.name] = _fitted(law, curve, num_resamples, seed)
    try:
        data["held_out"] = [
            {
                "law": result.law,
                "log_likelihood": result.log_likelihood,
                "behind": None if result.behind is None else result.behind._asdict(),
            }
            for result in compare(curve, seed=seed)
        ]
    except CannotFit as error:
        data["held_out"] = {"cannot_be_fitted": str(error)}
    local_slopes = slopes(curve, seed=seed)
    data["slopes"] = [
        {"from": slope.low_cost, "to": slope.high_cost, **slope.per_doubling._asdict()} for slope in local_slopes
    ]
    data["saturation"] = saturation(local_slopes)
    return data


def coverage_of(pools: Sequence[PooledChains], *, num_resamples: int, seed: int) -> Json:
    """Computes pass@k of a pool with its power law and its Beta-binomial fit; costs are numbers of chains."""
    num_chains = len(pools[0].right)
    num_right = np.array([int((chains.right & (chains.classes >= 0)).sum()) for chains in pools])
    counts = pool_sizes(num_chains)
    accuracy = np.stack([coverage.pass_at_k(num_chains, num_right, k) for k in counts], axis=1)
    curve = Curve(np.array(counts, np.float64), accuracy)
    data: Json = {"points": points(curve), "fits": {"coverage": _fitted(COVERAGE, curve, num_resamples, seed)}}
    try:
        model = coverage.fit_beta_binomial(num_chains, num_right, num_resamples=num_resamples, seed=seed)
    except CannotFit as error:
        data["fits"]["beta-binomial"] = {"cannot_be_fitted": str(error)}
    else:
        costs = np.geomspace(1, 2 * num_chains, 40)
        line = {"costs": costs.tolist(), "accuracy": model.pass_at_k(costs).tolist()}
        data["fits"]["beta-binomial"] = {**model.to_json(), "line": line}
    return data


def points(curve: Curve) -> list[Json]:
    """Returns the points of a curve: `[{"cost", "accuracy", "accuracy_ci"}]`."""
    return [
        {"cost": float(cost), "accuracy": float(column.mean()), "accuracy_ci": list(mean_interval(column))}
        for cost, column in zip(curve.costs, curve.accuracy.T, strict=True)
    ]


def _fitted(law: Any, curve: Curve, num_resamples: int, seed: int) -> Json:
    try:
        fitted = fit(law, curve, num_resamples=num_resamples, seed=seed)
    except CannotFit as error:
        return {"cannot_be_fitted": str(error)}
    costs = np.geomspace(curve.costs[0], curve.costs[-1], 40)
    low, high = fitted.band(costs)
    line = {"costs": costs, "accuracy": fitted.accuracy(costs), "low": low, "high": high}
    return {**fitted.to_json(), "line": {name: values.tolist() for name, values in line.items()}}


def accuracy_at(curve: Curve, cost: float) -> FloatArray | None:
    """Interpolates a curve at a cost, linearly in the logarithm of costs.

    Returns:
        `[problems]` accuracies; None beyond the curve.
    """
    if not curve.costs[0] <= cost <= curve.costs[-1]:
        return None
    j = min(max(int(np.searchsorted(curve.costs, cost)), 1), len(curve.costs) - 1)
    low, high = curve.costs[j - 1 : j + 1]
    weight = np.log(cost / low) / np.log(high / low) if high > low else 0.0
    return (1 - weight) * curve.accuracy[:, j - 1] + weight * curve.accuracy[:, j]
