"""Analysis: from the rows and the pool of chains to curves and laws."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from treedecode.common.arrays import FloatArray
from treedecode.common.intervals import mean_interval
from treedecode.study import coverage, pool
from treedecode.study.laws import COVERAGE, LAWS, CannotFit, Curve, compare, fit
from treedecode.study.pool import Chains
from treedecode.study.slopes import saturation, slopes

Json = dict[str, Any]


def pool_sizes(num_chains: int) -> list[int]:
    """1, 2, 4, ... up to the size of the pool."""
    return [1 << i for i in range(num_chains.bit_length())]


def curves_of(pools: Sequence[Chains], chain_tokens: float, pool_tokens: float, seed: int) -> dict[str, Curve]:
    """The curves a pool holds, by name; costs are tokens in multiples of the baseline's.

    Args:
        chain_tokens: of the baseline, per problem.
        pool_tokens: generated for a pool, with what its scores took.
    """
    num_chains = len(pools[0].right)
    counts = pool_sizes(num_chains)
    sampled = float(np.mean([chains.tokens.sum() for chains in pools])) / num_chains
    found = {
        "self_consistency": Curve(
            np.array(counts) * sampled / chain_tokens, pool.curve(pools, counts, "majority", seed=seed)
        )
    }
    if not any(np.isnan(chains.scores).any() for chains in pools):
        scored = pool_tokens / num_chains
        found["best_of_n"] = Curve(np.array(counts) * scored / chain_tokens, pool.curve(pools, counts, "best"))
    return found


def row_curves(rows: Sequence[Json]) -> dict[str, Curve]:
    """The curves whose budgets are rows of their own; they begin with the baseline, the first row.

    With one chain to spend there is nothing to choose, so the baseline is every such strategy's smallest budget.
    """
    good = [row for row in rows if row["error"] is None]
    found = {}
    for name in dict.fromkeys(row["curve"] for row in good if row["curve"]):
        members = [rows[0], *(row for row in good if row["curve"] == name)]
        members.sort(key=lambda row: row["tokens_x"])
        accuracy = np.array([row["correct"] for row in members], np.float64).T
        found[name] = Curve(np.array([row["tokens_x"] for row in members], np.float64), accuracy)
    return found


def laws_of(curve: Curve, *, num_resamples: int, seed: int) -> Json:
    """Everything that is said of a curve: its points, laws, which of them predicts best, slopes, saturation."""
    data: Json = {"points": points(curve), "fits": {}}
    for law in LAWS:
        data["fits"][law.name] = _fitted(law, curve, num_resamples, seed)
    try:
        data["held_out"] = [
            {
                "law": held.law,
                "log_likelihood": held.log_likelihood,
                "behind": None if held.behind is None else held.behind._asdict(),
            }
            for held in compare(curve, seed=seed)
        ]
    except CannotFit as error:
        data["held_out"] = {"cannot_be_fitted": str(error)}
    found = slopes(curve, seed=seed)
    data["slopes"] = [
        {"from": slope.low_cost, "to": slope.high_cost, **slope.per_doubling._asdict()} for slope in found
    ]
    data["saturation"] = saturation(found)
    return data


def coverage_of(pools: Sequence[Chains], *, num_resamples: int, seed: int) -> Json:
    """pass@k of a pool with its power law and its Beta-binomial fit; costs are numbers of chains."""
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
    """`[{"cost", "accuracy", "accuracy_ci"}]`."""
    return [
        {"cost": float(cost), "accuracy": float(column.mean()), "accuracy_ci": list(mean_interval(column))}
        for cost, column in zip(curve.costs, curve.accuracy.T, strict=True)
    ]


def _fitted(law: Any, curve: Curve, num_resamples: int, seed: int) -> Json:
    try:
        found = fit(law, curve, num_resamples=num_resamples, seed=seed)
    except CannotFit as error:
        return {"cannot_be_fitted": str(error)}
    costs = np.geomspace(curve.costs[0], curve.costs[-1], 40)
    low, high = found.band(costs)
    line = {"costs": costs, "accuracy": found.accuracy(costs), "low": low, "high": high}
    return {**found.to_json(), "line": {name: values.tolist() for name, values in line.items()}}


def accuracy_at(curve: Curve, cost: float) -> FloatArray | None:
    """`[problems]` accuracies at a cost between two budgets, in proportion on the log scale; None beyond the curve."""
    if not curve.costs[0] <= cost <= curve.costs[-1]:
        return None
    j = min(max(int(np.searchsorted(curve.costs, cost)), 1), len(curve.costs) - 1)
    low, high = curve.costs[j - 1 : j + 1]
    at = np.log(cost / low) / np.log(high / low) if high > low else 0.0
    return (1 - at) * curve.accuracy[:, j - 1] + at * curve.accuracy[:, j]
