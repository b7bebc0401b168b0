"""Measures spending and accuracy of dynamic allocation on the countdown model, in each of its modes.

    python -m bench.allocation --problems 100 --seed 2

Its peer is best-of-n, which gives every problem the same number of chains.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import treedecode as td
from treedecode.allocation.chain_costs import UNITS
from treedecode.allocation.gate import Gate
from treedecode.search.solutions import Result
from treedecode.strategies import Strategy
from treedecode.tasks.countdown import Countdown, model_path
from treedecode.verify import Value

MODES: dict[str, dict[str, Any]] = {
    "offline": {},
    "offline, waves of 4": {"wave": 4},
    "offline, bytes": {"unit": "kv_bytes"},
    "offline, at least 2 chains": {"floor": 2},
    "online": {"mode": "online"},
    "online, waves of 4": {"mode": "online", "wave": 4},
    "online, bytes": {"mode": "online", "unit": "kv_bytes"},
    "online, at least 2 chains": {"mode": "online", "floor": 2},
}


def strategies(budgets: list[int]) -> dict[str, dict[int, Strategy]]:
    """Returns the strategies by name and budget."""
    gate = Gate.load(model_path() / "gate.safetensors")
    modes = {
        name: {budget: td.DynamicAllocation(budget, gate, **settings) for budget in budgets}
        for name, settings in MODES.items()
    }
    return {"best of n": {budget: td.BestOfN(budget) for budget in budgets}, **modes}


def share_of_budget(result: Result, strategy: Strategy) -> float | None:
    """Returns the cost as a share of the budget; None where there is no budget."""
    if not isinstance(strategy, td.DynamicAllocation):
        return None
    single_chains = sum(solution.notes["bids"][0]["alone"] for solution in result.solutions)
    spent = sum(getattr(solution.spending, UNITS[strategy.unit]) for solution in result.solutions)
    return spent / (strategy.budget * single_chains)


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path, help="a file for the same numbers")
    arguments = parser.parse_args()
    task, verifier, rows = Countdown(), Value(model_path() / "value_head.safetensors"), []
    problems = task.problems(arguments.problems, seed=arguments.seed)
    print("| mode |" + "".join(f" {n}: of the budget | tokens | right |" for n in arguments.budgets))
    print("|---|" + "---|" * 3 * len(arguments.budgets))
    with td.Decoder.from_pretrained(model_path()) as decoder:
        for name, by_budget in strategies(arguments.budgets).items():
            line = f"| {name} |"
            for budget, strategy in by_budget.items():
                result = td.solve(
                    decoder, problems, strategy=strategy, task=task, verifier=verifier, seed=arguments.seed
                )
                share = share_of_budget(result, strategy)
                tokens = result.ledger.total.generated_tokens / len(problems)
                rows.append(
                    {"mode": name, "budget": budget, "spent": share, "tokens": tokens, "accuracy": result.accuracy}
                )
                line += f" {'' if share is None else f'{share:.1%}'} | {tokens:.1f} | {result.accuracy:.1%} |"
            print(line, flush=True)
    if arguments.json is not None:
        report = {"problems": len(problems), "seed": arguments.seed, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
