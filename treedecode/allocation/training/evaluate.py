"""Evaluates a gate on held-out problems: calibration, regret to the oracle, gain over uniform allocation, audit."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from treedecode.allocation.allocators import Policy
from treedecode.allocation.gate import Gate
from treedecode.allocation.training.audit import Allocation, audit
from treedecode.allocation.training.fit import make_examples, measure
from treedecode.allocation.training.fit_costs import measure_costs
from treedecode.allocation.training.resampling import holm
from treedecode.allocation.training.rollouts import Rollouts
from treedecode.allocation.training.simulate import Replay, ReplayResult, random_orders
from treedecode.common.intervals import difference_of, mean_interval

SCHEMA = "treedecode.gate_report/2"


def evaluate(
    gate: Gate,
    data: Rollouts,
    *,
    budgets: Sequence[float] = (3, 4, 6, 8),
    probes: int = 1,
    wave: int = 1,
    floors: Sequence[int] = (0, 3),
    repeats: int = 8,
    examples_per_problem: int = 8,
    permutations: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Replays a gate's allocation on rollouts, and compares it with the oracle's and with a uniform one.

    The chains of every problem come in `repeats` random orders, the same for all policies. Uniform allocation gives
    each problem the same number of chains; it is reported at the budget and at twice the budget. Accuracies and their
    differences have 95% BCa bootstrap intervals over problems, with repeats averaged first. The audit's p-values are
    reported as they are, and corrected for all tests of the report (Holm).

    Args:
        floors: minimum numbers of chains whose effect is reported at each budget; 0 = the probes alone.
        examples_per_problem: for the figures of calibration.
        permutations: of the audit's test.

    Returns:
        the report, as JSON.

    Raises:
        ValueError: the gate and the rollouts do not fit, or a number is out of range (named).
    """
    config = gate.config
    if config.hidden_size == 0:
        data = data.without_hidden()
    if data.hidden.shape[1] != config.hidden_size:
        raise ValueError(
            f"data: the gate reads hidden states of {config.hidden_size}, the rollouts have those of "
            f"{data.hidden.shape[1]}"
        )
    config.provenance.require(data.provenance, gate)
    if data.menu.tolist() != [list(item.shape) for item in config.menu]:
        raise ValueError(
            f"data: the gate knows the tree searches {[item.shape for item in config.menu]} (depth, width, keep), the "
            f"rollouts have {[tuple(entry) for entry in data.menu.tolist()]}"
        )
    check_policy(gate, data.num_chains, budgets=budgets, probes=probes, wave=wave)
    rng = np.random.default_rng(seed)
    max_chains = min(config.max_chains + wave, data.num_chains)
    replays = [Replay(data, random_orders(data, rng)) for _ in range(repeats)]
    held_out = make_examples(
        data,
        min_chains=config.min_chains,
        max_chains=min(config.max_chains, data.num_chains - 1),
        per_problem=examples_per_problem,
        rng=rng,
    )
    rows, audits = [], []
    for budget in budgets:
        by_floor = {}
        for floor in floors:
            policy = Policy(budget, max_chains, wave, floor)
            runs = [replay.offline(replay.gate_bidder(gate, wave), policy, probes) for replay in replays]
            oracle = [replay.offline(replay.oracle_bidder(), policy, probes) for replay in replays]
            allocation = _allocation(replays, runs, oracle, probes)
            by_floor[floor] = _accuracy(runs), audit(allocation, permutations=permutations, seed=seed)
            if floor == floors[0]:
                rows.append(_row(budget, runs, oracle, replays, seed))
        audits.append({"budget": budget, "floors": [_floor(floor, *report) for floor, report in by_floor.items()]})
    _add_corrected_p_values(audits)
    return {
        "schema": SCHEMA,
        "problems": len(data),
        "chains": data.num_chains,
        "repeats": repeats,
        "probes": probes,
        "wave": wave,
        "max_chains": max_chains,
        "calibration": {**measure(gate, held_out), "costs": measure_costs(gate, data)},
        "budgets": rows,
        "audits": audits,
    }


def check_policy(gate: Gate, num_chains: int, *, budgets: Sequence[float], probes: int, wave: int) -> None:
    """Checks a policy that is to be replayed on problems with `num_chains` chains.

    Raises:
        ValueError: a number is out of range (named).
    """
    if num_chains < 2:
        raise ValueError(f"chains: expected at least 2 of a problem, got {num_chains}")
    config = gate.config
    max_probes = min(config.max_chains, num_chains)
    if not config.min_chains <= probes <= max_probes:
        raise ValueError(f"probes: expected from {config.min_chains} to {max_probes}, got {probes}")
    if wave < 1:
        raise ValueError(f"wave: expected at least 1, got {wave}")
    for budget in budgets:
        if not probes <= budget < np.inf:
            raise ValueError(f"budgets: expected numbers from the {probes} of the probes on, got {budget}")


def _row(
    budget: float, runs: list[ReplayResult], oracle: list[ReplayResult], replays: list[Replay], seed: int
) -> dict[str, Any]:
    """Reports accuracies and their differences, each with its 95% interval over problems (paired)."""
    gate, best = _right(runs), _right(oracle)
    uniform, twice = (_uniform(replays, multiple) for multiple in (budget, 2 * budget))
    accuracies = {"accuracy": gate, "uniform": uniform, "uniform_at_twice": twice, "oracle": best}
    differences = {
        "regret_to_oracle": best - gate,
        "gain_over_uniform": None if uniform is None else gate - uniform,
        "gain_over_uniform_at_twice": None if twice is None else gate - twice,
    }
    row: dict[str, Any] = {"budget": budget, "spent": float(np.mean([run.multiple for run in runs]))}
    for name, values in {**accuracies, **differences}.items():
        row[name] = row[f"{name}_interval"] = None
        if values is not None:
            row[name] = float(values.mean())
            gap = name in differences
            ends = difference_of(values, seed=seed)[1:] if gap else mean_interval(values, seed=seed)
            row[f"{name}_interval"] = list(ends)
    return {
        **row,
        "tree_searches": float(np.mean([(run.trees >= 0).mean() for run in runs])),
        "deciles_of_chains": np.quantile(np.concatenate([run.chains for run in runs]), np.arange(1, 10) / 10).tolist(),
    }


def _uniform(replays: list[Replay], num_chains: float) -> np.ndarray | None:
    """Returns `_right` with the same number of chains for all problems.

    None where the rollouts have too few chains, or the number is no whole one.
    """
    if num_chains != int(num_chains) or num_chains > replays[0].data.num_chains:
        return None
    return _right([replay.uniform(int(num_chains)) for replay in replays])


def _right(runs: Sequence[ReplayResult]) -> np.ndarray:
    """Returns the share of repeats in which each problem came out right, `[n]`."""
    return np.mean([run.right for run in runs], axis=0)


def _accuracy(runs: Sequence[ReplayResult]) -> float:
    return float(_right(runs).mean())


def _add_corrected_p_values(audits: list[dict[str, Any]]) -> None:
    """Corrects p-values for all tests of the report (Holm)."""
    groups = [group for entry in audits for floor in entry["floors"] for group in floor["groups"].values()]
    for group, p_value in zip(groups, holm([group["p_value"] for group in groups]), strict=True):
        group["p_value_holm"] = p_value


def _floor(floor: int, accuracy: float, groups: dict[str, Any]) -> dict[str, Any]:
    rates = [group["false_low_budget_rate"] for group in groups.values()]
    return {
        "floor": floor,
        "accuracy": accuracy,
        "worst_group_accuracy": min(group["accuracy"] for group in groups.values()),
        "worst_false_low_budget_rate": max((rate for rate in rates if rate is not None), default=None),
        "groups": groups,
    }


def _allocation(replays: list[Replay], runs: list[ReplayResult], oracle: list[ReplayResult], probes: int) -> Allocation:
    """Puts all repeats together."""
    data = replays[0].data
    solved = [_solved_after(replay) for replay in replays]
    return Allocation(
        groups=np.tile(data.groups, len(runs)),
        problems=np.tile(np.arange(len(data)), len(runs)),
        difficulty=np.tile(data.right[:, : data.num_chains].mean(axis=1), len(runs)),
        chains=np.concatenate([run.chains for run in runs]),
        spend=np.concatenate([run.cost / run.single_chain_cost for run in runs]),
        probe_spend=np.concatenate([replay.uniform(probes).cost / replay.single_chain_cost for replay in replays]),
        oracle_spend=np.concatenate([run.cost / run.single_chain_cost for run in oracle]),
        needed=np.concatenate([np.where(s.any(axis=1), s.argmax(axis=1), data.num_chains) + 1 for s in solved]),
        probed=np.concatenate([s[:, probes - 1] for s in solved]),
        right=np.concatenate([run.right for run in runs]),
        available=data.num_chains,
    )


def _solved_after(replay: Replay) -> np.ndarray:
    """Tells where the answer selected from the first chain, the first two, ... is right, `[n, c]` bool."""
    data = replay.data
    chosen = [[replay.after(i, k + 1)[2] for k in range(data.num_chains)] for i in range(len(data))]
    return np.take_along_axis(data.right, np.array(chosen), axis=1)


def table(report: dict[str, Any]) -> str:
    """Formats a report for people."""
    lines = [f"{report['problems']} problems, {report['chains']} chains each in {report['repeats']} orders", ""]
    for name in ("solved", "chains"):
        figures = report["calibration"][name]
        lines.append(f"{name:<8} " + "  ".join(f"{key} {_shown(value)}" for key, value in figures.items()))
    for i, figures in enumerate(report["calibration"]["trees"]):
        lines.append(f"tree {i:<3} " + "  ".join(f"{key} {_shown(value)}" for key, value in figures.items()))
    for figures in report["calibration"]["costs"]:
        lines.append("  ".join(f"{key} {_shown(value)}" for key, value in figures.items()))
    columns = ("budget", "spent", "accuracy", "uniform", "uniform_at_twice", "oracle", "tree_searches")
    lines += ["", "".join(f"{name:>17}" for name in columns)]
    lines += ["".join(f"{_shown(row[name]):>17}" for name in columns) for row in report["budgets"]]
    differences = ("accuracy", "gain_over_uniform", "gain_over_uniform_at_twice", "regret_to_oracle")
    lines += ["", f"{'budget':>17}" + "".join(f"{name:>28}" for name in differences) + "   (95% intervals)"]
    lines += [
        f"{_shown(row['budget']):>17}" + "".join(f"{_with_interval(row, name):>28}" for name in differences)
        for row in report["budgets"]
    ]
    names = (
        "problems",
        "spend",
        "accuracy",
        "gain_per_unit",
        "false_low_budget_rate",
        "spend_gap",
        "oracle_spend_gap",
        "p_value",
        "p_value_holm",
    )
    for entry in report["audits"]:
        for by_floor in entry["floors"]:
            lines += ["", f"budget {entry['budget']}, floor {by_floor['floor']}: accuracy {by_floor['accuracy']:.3f}"]
            lines.append(f"  {'group':<14}" + "".join(f"{name:>22}" for name in names) + f"{'excess_gap':>28}")
            for group, figures in by_floor["groups"].items():
                shown = "".join(f"{_shown(figures[name]):>22}" for name in names)
                lines.append(f"  {group or '-':<14}{shown}{_with_interval(figures, 'excess_gap'):>28}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _with_interval(figures: dict[str, Any], name: str) -> str:
    if figures[name] is None:
        return "-"
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.3f} ({low:.3f} to {high:.3f})"
