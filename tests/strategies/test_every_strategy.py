"""Properties of every strategy: its branches and leftovers, its cost and budget, and that others do not change it."""

import asyncio

import numpy as np
import pytest
from support.counting import Count
from support.fake_task import FakeTask, Recorder, talkative_decoder
from support.fakes import FakeModel, FakeTokenizer, fake_decoder
from support.gates import gate

import treedecode as td
from treedecode.search.search import Search
from treedecode.strategies import STRATEGIES

TASK = FakeTask()
SMALL = {
    "chain": td.ChainOfThought(),
    "forced chain": td.ChainOfThought(min_tokens=8, wait="wait", max_tokens=10, answer_prompt="\nso ", answer_tokens=3),
    "refine": td.IterativeRefinement(max_passes=2, critique_tokens=3, critique_prompt="\nbad", revise_prompt="\nnew "),
    "rewrite": td.IterativeRefinement(max_passes=3, critique_prompt="", max_repeats=9),
    "majority": td.SelfConsistency(num_samples=5),
    "majority, beta": td.SelfConsistency(num_samples=6, stop="beta", window=2),
    "majority, window": td.SelfConsistency(num_samples=6, stop="window", window=2),
    "best of n": td.BestOfN(num_samples=4),
    "weighted": td.BestOfN(num_samples=4, answer="weighted"),
    "bfs": td.TreeOfThoughts(depth=2, width=3, keep=2),
    "dfs": td.TreeOfThoughts(depth=2, width=2, keep=2, order="dfs", max_visits=4),
    "proposals": td.TreeOfThoughts(depth=2, width=3, keep=2, generate="propose", propose_prompt="\n", propose_tokens=9),
    "beams": td.StepBeamSearch(num_beams=4, width=2),
    "lookahead": td.StepBeamSearch(num_beams=4, width=2, lookahead=1, answer="majority"),
    "dvts": td.DVTS(num_beams=4, width=2),
    "rebase": td.REBASE(width=4),
    "ets": td.ETS(width=4),
    "mcts": td.MCTS(num_simulations=3, width=2, parallel=2),
    "mcts, rollouts": td.MCTS(num_simulations=3, width=2, parallel=2, evaluate="rollout", answer="visits"),
    "particles": td.ParticleFilter(num_particles=4),
    "dynamic": td.DynamicAllocation(budget=4, gate=gate(Recorder(), TASK), max_chains=7),
    # this gate sends some problems to its tree search, others to more chains
    "dynamic, trees": td.DynamicAllocation(
        budget=6, gate=gate(Recorder(), TASK, trees=1, seed=11), probes=2, max_chains=7
    ),
    "dynamic, waves": td.DynamicAllocation(budget=4, gate=gate(Recorder(), TASK), wave=3, floor=3, unit="kv_bytes"),
    "dynamic, online": td.DynamicAllocation(budget=4, gate=gate(Recorder(), TASK), mode="online", lag=1, max_chains=7),
}
every_strategy = pytest.mark.parametrize("strategy", SMALL.values(), ids=SMALL.keys())
both_ways = pytest.mark.parametrize("captured", [False, True], ids=["op by op", "captured"])


def solve(dec, strategy, problems=None, verifier=None, **settings):
    problems = TASK.problems(2) if problems is None else problems
    verifier = Recorder() if verifier is None else verifier
    return td.solve(dec, problems, strategy=strategy, task=TASK, verifier=verifier, **settings)


def told(solution):
    return solution.answer, solution.text, solution.score, solution.correct, solution.is_cut


def everything_is_back(dec):
    dec.check_integrity()
    pool = dec.engine.pool
    assert dec.num_branches == 0
    assert pool.num_free_pages + len(dec.engine.store.index.pages()) == pool.num_pages
    assert dec.recorder.num_accounts == 0


def test_every_strategy_is_tried_here():
    assert {strategy.name for strategy in SMALL.values()} == set(STRATEGIES)


@both_ways
@every_strategy
def test_solutions_depend_on_the_problem_alone(strategy, captured):
    problems = TASK.problems(3)
    dec = talkative_decoder(captured=captured)
    together = solve(dec, strategy, problems)
    everything_is_back(dec)
    found = {solution.problem.id: told(solution) for solution in together.solutions}
    # one after another in the opposite order (that of a stream matters), on few pages, and as few branches as will do
    order = problems if getattr(strategy, "mode", "") == "online" else problems[::-1]
    tight = talkative_decoder(captured=captured, num_pages=40, max_branches=strategy.num_branches, prefill_tokens=8)
    again = solve(tight, strategy, order)
    assert {solution.problem.id: told(solution) for solution in again.solutions} == found
    for solution in together.solutions:
        assert solution.answer == (TASK.extract(solution.text) if solution.answer is not None else None)
        if solution.tree.nodes and (answers := [n for n in solution.tree.nodes if n.status == "answer"]):
            [node] = answers
            assert solution.tree.text(solution.tree.nodes.index(node)) == solution.text


@every_strategy
def test_it_holds_no_more_branches_than_it_says(strategy, monkeypatch):
    dec, held = talkative_decoder(), []

    def counted(original):
        def call(*args):
            rows = original(*args)
            held.append(dec.num_branches)
            return rows

        return call

    for name in ("open", "fork"):
        monkeypatch.setattr(dec.engine.store, name, counted(getattr(dec.engine.store, name)))
    for seed in range(3):
        solve(dec, strategy, TASK.problems(1), seed=seed)
    assert max(held) <= strategy.num_branches
    if strategy.name not in ("chain_of_thought", "tree_of_thoughts", "mcts"):  # there it takes some luck
        assert max(held) == strategy.num_branches


@both_ways
@every_strategy
def test_everything_comes_back_when_it_is_cancelled(strategy, captured):
    dec = talkative_decoder(captured=captured)

    async def cancelled(after):
        run = asyncio.ensure_future(
            td.solve_async(dec, TASK.problems(2), strategy=strategy, task=TASK, verifier=Recorder())
        )
        while len(dec.model.forwards) < after and not run.done():
            await asyncio.sleep(0)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    for after in (1, 4, 9):
        asyncio.run(cancelled(after + len(dec.model.forwards)))
        everything_is_back(dec)


@every_strategy
def test_everything_comes_back_when_the_verifier_raises(strategy):
    dec = talkative_decoder()
    asked = Recorder()
    solve(dec, strategy, verifier=asked)
    for fail_at in {0, len(asked.calls) // 2, len(asked.calls) - 1} & set(range(len(asked.calls))):
        with pytest.raises(ArithmeticError, match="the verifier broke") as error:
            solve(dec, strategy, verifier=Recorder(fail_at=fail_at))
        assert "while solving the problem 'test/" in error.value.__notes__[0]
        everything_is_back(dec)
    assert asked.calls or not strategy.needs_verifier


def without(spending, *names):
    return {name: value for name, value in vars(spending).items() if name not in names}


@every_strategy
def test_the_ledger_is_what_the_forwards_did(strategy, monkeypatch):
    dec = talkative_decoder()
    count = Count(dec, monkeypatch)
    accounts = {}
    open_account = dec.engine.meter.open

    def opened(parent=-1, **limits):
        account = open_account(parent, **limits)
        accounts.setdefault(account, parent)
        return account

    monkeypatch.setattr(dec.engine.meter, "open", opened)
    result = solve(dec, strategy)
    [run] = [account for account, parent in accounts.items() if parent == -1]
    apart = [account for account, parent in accounts.items() if parent == run]
    for spending, account in zip([*result.ledger.problems.values(), result.ledger.total], [*apart, None], strict=True):
        assert without(spending, "prompt_tokens", "flops", "generated_tokens") == without(
            count.spent[account], "prompt_tokens", "flops", "generated_tokens"
        )
        assert spending.generated_tokens == sum(count.sampled[account])
    lengths = [len(FakeTokenizer().encode(problem.prompt)) for problem in TASK.problems(2)]
    for spending, length in zip(result.ledger.problems.values(), lengths, strict=True):
        assert spending.prompt_tokens % length == 0
        assert spending.kv_bytes <= spending.kv_bytes_copied


@every_strategy
@pytest.mark.parametrize("per_problem", [False, True])
def test_a_budget_ends_it_within_one_forward(strategy, per_problem, monkeypatch):
    dec = talkative_decoder()
    too_long = {solution.problem.id for solution in solve(dec, strategy).solutions if solution.is_cut}
    for tokens in (1, 9, 25):
        with monkeypatch.context() as patch:
            count = Count(dec, patch)
            limit = td.Budget(tokens=tokens)
            result = solve(dec, strategy, budget=td.Budget(per_problem=limit) if per_problem else limit)
        for account, sampled in count.sampled.items():
            if per_problem != (account is None):
                assert sum(sampled[:-1]) < tokens
        cut = [solution for solution in result.solutions if solution.is_cut and solution.problem.id not in too_long]
        assert all((solution.answer is None) <= (solution.score is None) for solution in cut)
        if cut:
            assert max(sum(sampled) for sampled in count.sampled.values()) >= tokens
        everything_is_back(dec)


@every_strategy
def test_a_budget_ends_captured_steps_too(strategy):
    dec = talkative_decoder(captured=True)
    result = solve(dec, strategy, budget=td.Budget(tokens=9))
    assert result.ledger.total.generated_tokens < 9 + 2 * strategy.num_branches, "two problems, one token each"
    everything_is_back(dec)


class WithHidden(FakeModel):
    hidden_size = 4

    def forward_hidden(self, *inputs):
        logits = self.forward(*inputs)
        return logits, logits[:, :4]


class ValueHead(Recorder):
    """Scores come with the logits of the next tokens, whose first one then takes no forward."""

    async def __call__(self, frontier, problem):
        self.hidden = await frontier.hidden()
        return await super().__call__(frontier, problem)


@pytest.mark.parametrize("name", ["beams", "rebase", "mcts"])
def test_a_budget_counts_tokens_that_took_no_forward(name, monkeypatch):
    for tokens in range(1, 40, 3):
        dec = fake_decoder(WithHidden(eos_logit=1.5))
        with monkeypatch.context() as patch:
            count = Count(dec, patch)
            result = solve(dec, SMALL[name], TASK.problems(1), ValueHead(), budget=td.Budget(tokens=tokens))
        assert sum(count.sampled[None][:-1]) < tokens
        assert sum(count.sampled[None]) == result.ledger.total.generated_tokens
        everything_is_back(dec)


@pytest.mark.parametrize(
    "name",
    ["majority", "majority, beta", "beams", "mcts", "rewrite", "dynamic", "dynamic, waves", "dynamic, online"],
)
def test_a_killed_run_goes_on_where_it_was(name, tmp_path):
    problems = TASK.problems(4)
    whole = solve(talkative_decoder(), SMALL[name], problems)
    path, came = tmp_path / "journal.jsonl", []

    def kill(solution):
        came.append(solution.problem.id)
        if len(came) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(talkative_decoder(max_branches=20), SMALL[name], problems, journal=str(path), callback=kill)
    rest = []
    dec = talkative_decoder()
    again = solve(
        dec, SMALL[name], problems, journal=str(path), callback=lambda solution: rest.append(solution.problem.id)
    )
    assert set(rest[:2]) == set(came)
    assert sorted(rest) == [problem.id for problem in problems]
    assert list(map(told, again.solutions)) == list(map(told, whole.solutions))
    assert [s.tree.to_json() for s in again.solutions] == [s.tree.to_json() for s in whole.solutions]


@both_ways
@pytest.mark.parametrize("seed", range(3))
def test_pruning_a_sibling_changes_no_other_text(captured, seed):
    async def grown(dec, prune):
        search = Search(dec, TASK, TASK.problems(1)[0], prompt="the cat", sampling=td.Sampling(), seed=seed, account=-1)
        branches = (await search.root()).spread(5)
        names = np.arange(5)
        for i in range(2):
            await search.step(branches)
            if prune:
                kept = np.array([True, False, True, True, False, True])[i : i + len(branches)]
                branches, names = branches.spread(kept.astype(int)), names[kept]
        await search.complete(branches)
        return dict(zip(names.tolist(), branches.texts(), strict=True))

    dec = talkative_decoder(captured=captured)
    every, some = dec.run(grown(dec, False)), dec.run(grown(dec, True))
    assert len(some) < len(every)
    assert some == {name: every[name] for name in some}


def test_branches_take_their_seeds_from_the_run():
    strategy = td.BestOfN(num_samples=3, sampling=td.Sampling(seed=1))
    with pytest.raises(ValueError, match="sampling: best_of_n has the seed 1; branches take theirs from the run's"):
        solve(talkative_decoder(), strategy)
    texts = [solve(talkative_decoder(), td.BestOfN(num_samples=3), seed=seed).solutions[0].text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
