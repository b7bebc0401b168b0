"""A gate on held-out problems: calibration, regret to the oracle, gain over uniform allocation, audit."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from treedecode.gate.model import Gate
from treedecode.gate.sharing import Terms
from treedecode.gate_training.audit import Allocation, audit
from treedecode.gate_training.costs import measure_costs
from treedecode.gate_training.fit import look, measure
from treedecode.gate_training.rollouts import Rollouts
from treedecode.gate_training.simulate import Replay, Spent, orders

SCHEMA = "treedecode.gate_report/1"


def evaluate(
    gate: Gate,
    data: Rollouts,
    *,
    budgets: Sequence[float] = (3, 4, 6, 8),
    probes: int = 1,
    wave: int = 1,
    floors: Sequence[int] = (0, 3),
    repeats: int = 8,
    looks: int = 8,
    permutations: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The report on a gate, as JSON.

    Policies are replayed on the rollouts with the chains of every problem in `repeats` random orders, the same for all
    policies. Uniform allocation gives each problem as many chains; it is shown at the budget and at twice that.

    Args:
        floors: minimum numbers of chains whose effect is shown at each budget; 0 = the probes alone.
        permutations: of the audit's test.

    Raises:
        ValueError: the gate and the rollouts do not fit, or a number is out of range (named).
    """
    config = gate.config
    if config.hidden_size == 0:
        data = data.without_hidden()
    if data.hidden.shape[1] != config.hidden_size or data.has_scores != config.uses_verifier:
        raise ValueError(
            f"data: the gate reads hidden states of {config.hidden_size} and {_scores(config.uses_verifier)}, the "
            f"rollouts have hidden states of {data.hidden.shape[1]} and {_scores(data.has_scores)}"
        )
    if data.menu.tolist() != [list(item.shape) for item in config.menu]:
        raise ValueError(
            f"data: the gate knows the tree searches {[item.shape for item in config.menu]} (depth, width, keep), the "
            f"rollouts have {[tuple(entry) for entry in data.menu.tolist()]}"
        )
    check_policy(gate, data.num_chains, budgets=budgets, probes=probes, wave=wave)
    rng = np.random.default_rng(seed)
    max_chains = min(config.max_chains + wave, data.num_chains)
    replays = [Replay(data, orders(data, rng)) for _ in range(repeats)]
    held_out = look(
        data,
        min_chains=config.min_chains,
        max_chains=min(config.max_chains, data.num_chains - 1),
        looks=looks,
        rng=rng,
    )
    rows, audits = [], []
    for budget in budgets:
        by_floor = {}
        for floor in floors:
            terms = Terms(budget, max_chains, wave, floor)
            runs = [replay.dynamic(replay.by_gate(gate, wave), terms, probes) for replay in replays]
            allocation = _allocation(replays, runs, probes)
            by_floor[floor] = _accuracy(runs), audit(allocation, permutations=permutations, seed=seed)
            if floor == floors[0]:
                rows.append(_row(budget, runs, replays, terms, probes))
        audits.append({"budget": budget, "floors": [_floor(floor, *found) for floor, found in by_floor.items()]})
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
    """Checks what is to be replayed on problems of so many chains.

    Raises:
        ValueError: a number is out of range (named).
    """
    if num_chains < 2:
        raise ValueError(f"chains: expected at least 2 of a problem, got {num_chains}")
    config = gate.config
    most = min(config.max_chains, num_chains)
    if not config.min_chains <= probes <= most:
        raise ValueError(f"probes: expected from {config.min_chains} to {most}, got {probes}")
    if wave < 1:
        raise ValueError(f"wave: expected at least 1, got {wave}")
    for budget in budgets:
        if not probes <= budget < np.inf:
            raise ValueError(f"budgets: expected numbers from the {probes} of the probes on, got {budget}")


def _row(budget: float, runs: list[Spent], replays: list[Replay], terms: Terms, probes: int) -> dict[str, Any]:
    oracle = [replay.dynamic(replay.by_oracle(), terms, probes) for replay in replays]
    gate, best = _accuracy(runs), _accuracy(oracle)
    uniform, twice = (_uniform(replays, multiple) for multiple in (budget, 2 * budget))
    return {
        "budget": budget,
        "spent": float(np.mean([run.multiple for run in runs])),
        "accuracy": gate,
        "uniform": uniform,
        "uniform_at_twice": twice,
        "oracle": best,
        "regret_to_oracle": best - gate,
        "gain_over_uniform": None if uniform is None else gate - uniform,
        "gain_over_uniform_at_twice": None if twice is None else gate - twice,
        "tree_searches": float(np.mean([(run.trees >= 0).mean() for run in runs])),
        "deciles_of_chains": np.quantile(np.concatenate([run.chains for run in runs]), np.arange(1, 10) / 10).tolist(),
    }


def _uniform(replays: list[Replay], num_chains: float) -> float | None:
    """Accuracy with so many chains for all; None where the rollouts have too few, or it is no whole number."""
    if num_chains != int(num_chains) or num_chains > replays[0].data.num_chains:
        return None
    return _accuracy([replay.uniform(int(num_chains)) for replay in replays])


def _accuracy(runs: Sequence[Spent]) -> float:
    return float(np.mean([run.right.mean() for run in runs]))


def _floor(floor: int, accuracy: float, groups: dict[str, Any]) -> dict[str, Any]:
    rates = [group["false_low_budget_rate"] for group in groups.values()]
    return {
        "floor": floor,
        "accuracy": accuracy,
        "worst_group_accuracy": min(group["accuracy"] for group in groups.values()),
        "worst_false_low_budget_rate": max((rate for rate in rates if rate is not None), default=None),
        "groups": groups,
    }


def _allocation(replays: list[Replay], runs: list[Spent], probes: int) -> Allocation:
    """All repeats together."""
    data = replays[0].data
    solved = [_solved_after(replay) for replay in replays]
    return Allocation(
        groups=np.tile(data.groups, len(runs)),
        problems=np.tile(np.arange(len(data)), len(runs)),
        difficulty=np.tile(data.right[:, : data.num_chains].mean(axis=1), len(runs)),
        chains=np.concatenate([run.chains for run in runs]),
        spend=np.concatenate([run.cost / run.alone for run in runs]),
        needed=np.concatenate([np.where(s.any(axis=1), s.argmax(axis=1), data.num_chains) + 1 for s in solved]),
        probed=np.concatenate([s[:, probes - 1] for s in solved]),
        right=np.concatenate([run.right for run in runs]),
        available=data.num_chains,
    )


def _solved_after(replay: Replay) -> np.ndarray:
    """`[n, c]` bool: whether the answer selected of the first chain, the first two, ... is right."""
    data = replay.data
    chosen = [[replay.after(i, k + 1)[2] for k in range(data.num_chains)] for i in range(len(data))]
    return np.take_along_axis(data.right, np.array(chosen), axis=1)


def table(report: dict[str, Any]) -> str:
    """The report in lines for people."""
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
    names = (
        "problems",
        "spend",
        "accuracy",
        "gain_per_unit",
        "false_low_budget_rate",
        "spend_gap",
        "spend_gap_p_value",
    )
    for found in report["audits"]:
        for by_floor in found["floors"]:
            lines += ["", f"budget {found['budget']}, floor {by_floor['floor']}: accuracy {by_floor['accuracy']:.3f}"]
            lines.append(f"  {'group':<14}" + "".join(f"{name:>22}" for name in names))
            for group, figures in by_floor["groups"].items():
                lines.append(f"  {group or '-':<14}" + "".join(f"{_shown(figures[name]):>22}" for name in names))
    return "\n".join(lines)


def _scores(there: bool) -> str:
    return "scores" if there else "no scores"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
