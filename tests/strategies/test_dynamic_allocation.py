"""Dynamic allocation on a model that is a hash: its spending, its leftovers, and its solutions in any order."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.fake_task import Digits, FakeTask
from support.fakes import FakeModel
from support.gates import IDENTITY
from support.gates import gate as gate_for

import treedecode as td
from treedecode.allocation.allocate import Bid
from treedecode.allocation.allocators import BidHistory
from treedecode.allocation.calibration import Isotonic
from treedecode.allocation.features import FEATURE_NAMES
from treedecode.allocation.gate import Gate
from treedecode.allocation.provenance import Provenance
from treedecode.search.solve import solve_async
from treedecode.strategies.dynamic_allocation import DynamicAllocation
from treedecode.tasks.base import Problem
from treedecode.tasks.jsonl import Jsonl
from treedecode.verify.scorers import Likelihood


class Killed(Exception):
    """Stands for the end of the process, which only releases branches afterwards."""


class Fixed(Digits):
    """Cuts every chain at 8 tokens."""

    end, max_new_tokens = (), 8


EXACT = td.Sampling(ignore_eos=True)
PROBLEMS = [Problem(f"p{i}", f"the {word} {i}", str(i)) for i, word in enumerate(["cat", "dog", "end", "a", "b"])]


def rates(problem, text):
    """Scores a text by some number in [0, 1)."""
    return (sum(text.encode()) * 37 % 101) / 101


def gate(verifier=rates, **settings):
    return gate_for(verifier, Digits(), **settings)


def strategy(**settings):
    return DynamicAllocation(
        **{"budget": 4, "gate": gate(trees=1), "max_chains": 12, "wave": 3, "probes": 2, **settings}
    )


def run(dec, chosen, problems=PROBLEMS, **settings):
    settings = {"task": Digits(), "verifier": rates, "seed": 5, **settings}
    return td.solve(dec, problems, strategy=chosen, **settings)


def essence(result):
    """Describes a solution, without its times."""
    return {
        s.problem.id: {k: v for k, v in s.to_json().items() if k not in ("seconds", "spending")}
        for s in result.solutions
    }


@pytest.mark.parametrize("budget", [2.0, 3.5, 6.0])
def test_with_chains_of_known_length_the_budget_is_met_to_the_chain(make_decoder, budget):
    for unit, wave in (("tokens", 3), ("tokens", 1)):
        chosen = strategy(budget=budget, gate=gate(None), unit=unit, wave=wave)
        result = run(make_decoder(), chosen, task=Fixed(), verifier=None, sampling=EXACT)
        total = result.ledger.total.generated_tokens
        assert budget * 8 * len(PROBLEMS) - 8 < total <= budget * 8 * len(PROBLEMS)


@pytest.mark.parametrize("unit", ["tokens", "kv_bytes"])
def test_the_budget_is_kept_within_one_wave(make_decoder, unit):
    dec = make_decoder()
    result = run(dec, strategy(unit=unit, gate=gate()))
    bids = [solution.notes["bids"] for solution in result.solutions]
    field = {"tokens": "generated_tokens", "kv_bytes": "kv_bytes"}[unit]
    spent = sum(getattr(solution.spending, field) for solution in result.solutions)
    assert spent == sum(solution.notes["spent"] for solution in result.solutions)
    allowed = 4 * sum(of_one[0]["alone"] for of_one in bids)
    longest = max(node.num_tokens for s in result.solutions for node in s.tree.nodes if node.kind == "generated")
    token_bytes = dec.engine.meter.token_bytes
    chain = longest if unit == "tokens" else longest * (longest + 20) * token_bytes
    assert spent <= allowed + 3 * chain * len(PROBLEMS)
    assert len({len(of_one) for of_one in bids}) > 1, "all problems were treated alike"


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_solutions_depend_neither_on_room_nor_on_order(make_decoder, mode):
    chosen = strategy(mode=mode, lag=2)
    wide = run(make_decoder(max_branches=64), chosen)
    assert essence(run(make_decoder(max_branches=chosen.num_branches), chosen)) == essence(wide)
    if mode == "offline":
        assert essence(run(make_decoder(), chosen, PROBLEMS[::-1])) == essence(wide)


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_goes_on_from_a_journal_ends_like_one_that_was_never_interrupted(
    make_decoder, tmp_path, mode, after
):
    chosen = strategy(mode=mode, lag=2, max_chains=6)
    whole = run(make_decoder(), chosen)
    seen = []

    def kill(solution):
        seen.append(solution)
        if len(seen) == after:
            raise Killed

    journal = str(tmp_path / "journal")
    with pytest.raises(Killed):
        run(make_decoder(), chosen, journal=journal, callback=kill)
    resumed = run(make_decoder(), chosen, journal=journal)
    assert essence(resumed) == essence(whole)
    ledger = resumed.ledger
    assert ledger.total.generated_tokens == whole.ledger.total.generated_tokens + ledger.lost_tokens
    with pytest.raises(ValueError, match=r"strategy was"):
        run(make_decoder(), strategy(mode=mode, lag=2, max_chains=6, gate=gate(trees=1, seed=1)), journal=journal)


def test_notes_are_json_that_reads_back_exactly(make_decoder):
    for solution in run(make_decoder(), strategy()).solutions:
        assert json.loads(json.dumps(solution.notes)) == solution.notes
        history = BidHistory.by_problem({"": solution.notes})[""]
        assert [bid.to_json() for bid in history.bids] == solution.notes["bids"]
        assert history.bids == [Bid.from_json(bid) for bid in solution.notes["bids"]]


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_verifier_that_raises_ends_the_run_and_leaves_nothing(make_decoder, mode, at):
    calls = []

    def breaks(problem, text):
        calls.append(text)
        if len(calls) == at:
            raise ArithmeticError("no score")
        return 0.5

    with pytest.raises(ArithmeticError, match="no score"):
        run(make_decoder(), strategy(mode=mode, gate=gate(breaks, trees=1)), verifier=breaks)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_cancelled_run_leaves_nothing(make_decoder, mode):
    dec = make_decoder()

    async def cut():
        work = asyncio.ensure_future(
            solve_async(dec, PROBLEMS, strategy=strategy(mode=mode), task=Digits(), verifier=rates)
        )
        while dec.stats.num_forwards < 20:
            await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cut())


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("budget", [td.Budget(per_problem=td.Budget(tokens=30)), td.Budget(tokens=120)])
def test_problems_that_a_hard_budget_ends_keep_nobody_waiting(make_decoder, mode, budget):
    result = run(make_decoder(), strategy(mode=mode, budget=8, lag=1), budget=budget)
    assert any(solution.is_cut for solution in result.solutions)
    assert all(solution.answer is not None or solution.is_cut for solution in result.solutions)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_floor_is_what_every_problem_gets(make_decoder, mode):
    # a gate to which everything is solved gives no more than it must
    sure = gate(None)
    sure.calibrators = (Isotonic(np.array([0.0]), np.array([1.0])), IDENTITY)
    for floor in (0, 5):
        chosen = strategy(gate=sure, floor=floor, budget=6, mode=mode)
        result = run(make_decoder(), chosen, task=Fixed(), verifier=None, sampling=EXACT)
        spent = [solution.spending.generated_tokens for solution in result.solutions]
        assert spent == [8 * max(2, floor)] * len(PROBLEMS)


def test_the_best_scored_answer_wins_and_the_tree_is_used(make_decoder):
    # a gate that sends everything to the tree search
    eager = gate(trees=1)
    eager.calibrators = (
        Isotonic(np.array([0.0]), np.array([0.0])),
        IDENTITY,
        Isotonic(np.array([0.0]), np.array([1.0])),
    )
    with torch.no_grad():
        eager.network.heads.weight.zero_()
        eager.network.heads.bias[1] = -9.0  # and expects nothing of chains
    result = run(make_decoder(), strategy(gate=eager, budget=6))
    depth = 0
    for solution in result.solutions:
        nodes = solution.tree.nodes
        leaves = [i for i in solution.tree.leaves() if nodes[i].score is not None and nodes[i].status != "pruned"]
        finals = [i for i in leaves if solution.tree.text(i).endswith("\n")]
        answered = [nodes[i].score for i in finals if Digits().extract(solution.tree.text(i)) is not None]
        assert solution.score == max(answered, default=solution.score)
        assert len(solution.notes["bids"]) == 1
        depth = max(depth, *(len(solution.tree.path(i)) for i in leaves))
    assert depth == 4, "a prompt, the two steps of the search, and the rest"


def test_hidden_states_are_read_where_the_gate_wants_them(make_decoder):
    class WithHidden(FakeModel):
        hidden_size = 3

        def forward_hidden(self, input_ids, position_ids, context, logit_rows):
            logits = self.forward(input_ids, position_ids, context, logit_rows)
            return logits, logits[:, 2:5].contiguous()

    chosen = strategy(gate=gate(hidden_size=3))
    first = run(make_decoder(WithHidden()), chosen)
    assert essence(run(make_decoder(WithHidden()), chosen)) == essence(first)
    with pytest.raises(ValueError, match=r"model: FakeModel has no forward_hidden"):
        run(make_decoder(), chosen)
    with pytest.raises(ValueError, match=r"gate: Gate\(\w+\) reads hidden states of 4, and this model's have 3"):
        run(make_decoder(WithHidden()), strategy(gate=gate(hidden_size=4)))
    assert len(FEATURE_NAMES) == 17


def test_a_gate_says_whether_there_is_to_be_a_verifier(make_decoder):
    known = r"Gate\(\w+\) was trained with TextScorer\(fn=<function rates>, probability=False, workers=0\)"
    with pytest.raises(ValueError, match=rf"verifier: {known}, and the run has none; train a gate for it \(`tree"):
        run(make_decoder(), strategy(), verifier=None)
    with pytest.raises(ValueError, match=rf"verifier: {known}, and the run has Likelihood\(normalize=True\); train"):
        run(make_decoder(), strategy(), verifier=Likelihood())
    with pytest.raises(ValueError, match=r"was trained with no verifier, and the run has TextScorer\(.*rates"):
        run(make_decoder(), strategy(gate=gate(None)))


def test_a_gate_is_for_its_task_and_its_model(make_decoder, tmp_path):
    with pytest.raises(ValueError, match=r"task: Gate\(\w+\) was trained on 'digits', and the run is of 'fake'; train"):
        run(make_decoder(), strategy(), task=FakeTask())
    with pytest.raises(ValueError, match=r"model: Gate\(\w+\) was trained on one of 52 tokens and 2 layers, and the r"):
        run(make_decoder(Deeper()), strategy())
    # a file of problems is as good as another one: training and use have different ones
    origins = []
    for name in ("first.jsonl", "second.jsonl"):
        (tmp_path / name).write_text('{"question": "a", "answer": "1"}\n')
        origins.append(Provenance.of(SimpleNamespace(model=FakeModel), Jsonl(tmp_path / name), None))
    assert origins[0] == origins[1]


class Deeper(FakeModel):
    num_layers = 3


def test_a_stream_begins_at_the_price_of_its_budget(make_decoder):
    cheap, dear = (strategy(mode="online", budget=budget).share(["a"], {}).price for budget in (2, 8))
    assert 0.001 < dear < cheap < 0.5
    assert strategy(mode="online", price=0.2).share(["a"], {}).price == 0.2
    one = gate()
    unknown = Gate(replace(one.config, prices=()), *parts(one))
    with pytest.raises(ValueError, match=r"price: Gate\(\w+\) knows no prices of budgets; give the one to begin with"):
        run(make_decoder(), strategy(mode="online", gate=unknown))
    assert run(make_decoder(), strategy(mode="online", gate=unknown, price=0.1)).solutions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1.5}, r"budget: expected a number >= 2"),
        ({"budget": 4, "floor": 5}, r"budget: expected a number >= 5"),
        ({"budget": "4"}, r"budget: expected a number"),
        ({"probes": 0}, r"probes: expected a number from 1 to 16"),
        ({"max_chains": 40}, r"max_chains: expected a number from 2 to 19"),
        ({"mode": "stream"}, r"mode: expected one of 'offline', 'online', got 'stream'"),
        ({"unit": "joules"}, r"unit: expected one of 'tokens', 'kv_bytes', got 'joules'"),
        ({"wave": 0}, r"wave: expected a number >= 1"),
        ({"price": 0}, r"price: expected a number from 0.0001 to 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        strategy(**settings)


def test_a_problem_gets_no_more_chains_than_the_limit(make_decoder):
    for most, chains in ((None, 19), (7, 7)):
        eager = gate(None)
        eager.calibrators = (Isotonic(np.array([0.0]), np.array([0.0])), IDENTITY)  # nothing is ever solved
        chosen = strategy(gate=eager, max_chains=most, budget=30)
        result = run(make_decoder(), chosen, task=Fixed(), verifier=None, sampling=EXACT)
        assert [solution.spending.generated_tokens for solution in result.solutions] == [8 * chains] * len(PROBLEMS)


def test_the_description_tells_gates_apart():
    assert repr(strategy()) == repr(strategy())
    assert repr(strategy()) != repr(strategy(gate=gate(trees=1, seed=1)))
    assert repr(strategy()) != repr(
        strategy(
            gate=Gate(replace(gate().config, provenance=replace(gate().config.provenance, task="x")), *parts(gate()))
        )
    )


def parts(one):
    return one.network, one.mean, one.std, one.calibrators, one.costs
