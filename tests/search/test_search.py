"""Search, and the methods of Frontier that only searches use: growth, the record, and the best solution so far."""

import numpy as np
import pytest
from support.fake_task import FakeTask, Recorder, talkative_decoder

import treedecode as td
from treedecode.accounting.budget import Budget
from treedecode.cache.page_pool import OutOfBranches
from treedecode.search.search import Search

TASK = FakeTask(end=(".",), max_new_tokens=20)


def on_a_search(work, scorer=None, task=TASK, **options):
    """Runs `work(search)` as a run would run a strategy, and returns its result."""
    dec = talkative_decoder(**options)

    async def run():
        account = Budget().open(dec.engine.meter)
        problem = task.problems(1)[0]
        search = Search(
            dec,
            task,
            problem,
            prompt=dec.encode(problem.prompt),
            sampling=td.Sampling(),
            seed=0,
            account=account,
            score=scorer,
        )
        dec.recorder.start(account, search.tree)
        try:
            return await work(search)
        finally:
            dec.recorder.stop(account)

    found = dec.run(run())
    dec.check_integrity()
    return found


def test_spread_replaces_its_parents():
    async def work(search):
        table = search.decoder.engine.table
        root = await search.root()
        branches = root.spread(3)
        assert search.decoder.num_branches == 3
        await search.step(branches)
        texts, rows, seeds = branches.texts(), branches.branches.copy(), table.seed[branches.branches].copy()
        branches.scores = np.array([0.1, 0.2, 0.3])
        nodes = branches.nodes
        spread = branches.spread([2, 0, 3])
        assert spread.texts() == [texts[0]] * 2 + [texts[2]] * 3
        assert spread.scores.tolist() == [0.1] * 2 + [0.3] * 3
        assert search.decoder.num_branches == len(spread) == 5
        assert [spread.branches[0], spread.branches[2]] == [rows[0], rows[2]], "the first are the parents themselves"
        assert len(set(table.seed[spread.branches].tolist()) | {seeds[1]}) == 6
        assert [search.tree.nodes[i].status for i in nodes] == ["open", "pruned", "open"]
        with pytest.raises(RuntimeError, match="was released, pruned or merged"):
            branches.texts()
        for wrong in ([0] * 5, [1] * 4 + [-1]):
            with pytest.raises(ValueError, match="counts: expected numbers >= 0, not all of them 0"):
                spread.spread(wrong)
        with pytest.raises(OutOfBranches, match="out of"):
            spread.spread(3)
        assert search.decoder.num_branches == 0

    on_a_search(work, max_branches=8)


def test_every_branch_has_its_own_limit():
    async def work(search):
        branches = (await search.root()).spread(4)
        await branches.select([0, 1]).extend(max_new_tokens=[7, 3], sampling=td.Sampling(ignore_eos=True))
        assert [len(ids) for ids in branches.token_ids()] == [7, 3, 0, 0]
        task = FakeTask(end=(), max_new_tokens=9, max_step_tokens=4, stop="\n\n")
        search.task = task
        await search.complete(branches, td.Sampling(ignore_eos=True))
        assert [len(ids) for ids in branches.token_ids()] == [9] * 4
        assert not search.unfinished(branches).any()
        for wrong, message in (([1, 2], "max_new_tokens: expected an int, or 4"), ([1, 1, 0, 1], "at least 1")):
            with pytest.raises(ValueError, match=message):
                await branches.extend(max_new_tokens=wrong)

    on_a_search(work)


def test_a_branch_without_room_is_finished():
    async def work(search):
        branches = await search.root()
        search.task = FakeTask(end=(), stop="\n\n", max_step_tokens=300, max_new_tokens=600)
        steps = 0
        while search.unfinished(branches).any():
            await search.step(branches, td.Sampling(ignore_eos=True))
            steps += 1
        assert branches.num_tokens.tolist() == [80]
        assert search.room(branches).tolist() == [0]

    on_a_search(work, num_pages=20)


def test_only_chosen_branches_are_scored():
    asked = Recorder()

    async def work(search):
        branches = (await search.root()).spread(4)
        await search.complete(branches)
        before = (await search.score(branches)).copy()
        scores = await search.score(branches, np.array([False, True, False, True]))
        assert [len(call) for call in asked.calls] == [4, 2]
        assert asked.calls[1] == asked.calls[0][1::2]
        assert scores.tolist() == before.tolist() == branches.scores.tolist()
        await search.score(branches, np.zeros(4, bool))
        assert len(asked.calls) == 2

    on_a_search(work, asked)


def test_the_record_follows_a_branch_back():
    async def work(search):
        chain = await search.root()
        task = FakeTask(end=("nothing",), stop="\n\n", max_step_tokens=4)
        search.task = task
        for _ in range(3):
            await search.step(chain, td.Sampling(ignore_eos=True))
        begin = int(chain.num_prompt_tokens[0])
        for kept, is_new in ((8, False), (6, True), (0, False)):
            count = len(search.tree.nodes)
            back = chain.fork_at(begin + kept)
            assert search.tree.text(int(back.nodes[0])) == back.texts()[0]
            assert (len(search.tree.nodes) > count) == is_new
            await search.step(back, td.Sampling(ignore_eos=True))
            [node] = back.nodes.tolist()
            assert search.tree.text(node) == back.texts()[0]
            assert sum(search.tree.nodes[i].num_tokens for i in search.tree.path(node)) == back.num_tokens[0]

    on_a_search(work)


def test_a_search_cut_short_knows_its_complete_solutions():
    async def work(search):
        branches = (await search.root()).spread(12)
        await search.complete(branches, td.Sampling(temperature=1.5, seed=5))
        ended = branches.finished
        assert ended.any()
        search.tree.nodes = [
            node for i, node in enumerate(search.tree.nodes) if node.kind == "prompt" or i in branches.nodes[ended]
        ]
        outcome = search.best_so_far()
        answers = [answer for answer, done in zip(search.answers(branches), ended, strict=True) if done]
        assert outcome.answer in answers
        assert (outcome.answer is None) == all(answer is None for answer in answers)

    on_a_search(work)


def test_a_scored_solution_counts_though_the_search_went_on_from_it():
    async def work(search):
        chain = await search.root()
        chain.append("abc.")
        await search.score(chain)
        node = int(chain.nodes[0])
        chain.append("more")
        outcome = search.best_so_far()
        assert (outcome.text, outcome.node, outcome.answer) == ("abc.", node, TASK.extract("abc."))

    on_a_search(work, Recorder())


def test_a_text_without_an_answer_is_wrong_whatever_the_task_says():
    class Lenient(FakeTask):
        def extract(self, text):
            return None

        def verify(self, problem, text):
            return True

    task = Lenient(end=(".",), max_new_tokens=20)
    for graded, correct in ((True, False), (False, None)):
        strategy = td.SelfConsistency(num_samples=2)
        result = td.solve(talkative_decoder(), task.problems(1), strategy=strategy, task=task, grade=graded)
        [solution] = result.solutions
        assert (solution.answer, solution.correct) == (None, correct)
