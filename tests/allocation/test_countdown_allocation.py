"""Dynamic allocation with the countdown model, its value head and its gate, in each of its modes."""

import pytest

import treedecode as td
from treedecode.allocation.chain_costs import UNITS
from treedecode.allocation.gate import Gate
from treedecode.tasks.countdown import Countdown, model_path
from treedecode.verify import Value

TASK = Countdown()
PROBLEMS = TASK.problems(32, seed=2)
MODES = {
    "tokens": {},
    "bytes": {"unit": "kv_bytes"},
    "waves": {"wave": 4},
    "floor": {"floor": 2, "budget": 3},
    "stream": {"mode": "online", "lag": 16},
    "stream, all": {"mode": "online", "lag": 16, "unit": "kv_bytes", "wave": 2},
}


@pytest.fixture(scope="module")
def solve():
    settings = {"task": TASK, "verifier": Value(model_path() / "value_head.safetensors"), "seed": 2}
    with td.Decoder.from_pretrained(model_path(), kv_memory="64MiB") as decoder:
        yield lambda strategy: td.solve(decoder, PROBLEMS, strategy=strategy, **settings)


@pytest.fixture(scope="module")
def one_chain(solve):
    return solve(td.BestOfN(1)).accuracy


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
def test_a_mode_spends_its_budget_where_it_helps(solve, one_chain, settings):
    settings = {"budget": 2, "max_chains": 6, "gate": Gate.load(model_path() / "gate.safetensors"), **settings}
    strategy = td.DynamicAllocation(**settings)
    result = solve(strategy)
    bids = [solution.notes["bids"] for solution in result.solutions]
    spent = sum(getattr(solution.spending, UNITS[strategy.unit]) for solution in result.solutions)
    asked = strategy.budget * sum(of_one[0]["alone"] for of_one in bids)
    if strategy.mode == "offline":
        chain = max(bid["chain_cost"] for of_one in bids for bid in of_one)
        assert asked - chain < spent < asked + strategy.wave * chain
    else:  # three standard errors of so few problems
        assert spent == pytest.approx(asked, rel=0.4)
    chains = [len(leaves_of(solution)) for solution in result.solutions]
    assert min(chains) >= max(1, strategy.floor)
    assert max(chains) > 2 * min(chains), "all were treated alike"
    assert result.accuracy > one_chain


def leaves_of(solution):
    return [i for i in solution.tree.leaves() if solution.tree.nodes[i].kind == "generated"]
