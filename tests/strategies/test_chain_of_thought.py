"""Chain of thought: budget forcing below the minimum and at the maximum."""

import pytest
from support.fake_task import FakeTask, talkative_decoder
from support.fakes import FakeTokenizer
from support.strategy_cases import solve_one

import treedecode as td


class Answered(FakeTask):
    """Any text has come to an answer."""

    def is_final(self, text):
        return True


def nodes_of(solution):
    return [solution.tree.nodes[i] for i in solution.tree.path(len(solution.tree.nodes) - 1)][1:]


def test_budget_forcing_holds_both_ends():
    task, waited, forced = FakeTask(end=(".",), max_new_tokens=40), 0, 0
    wait_tokens = len(FakeTokenizer().encode("wait"))
    for seed in range(6):
        free = solve_one(td.ChainOfThought(), task=task, seed=seed)
        strategy = td.ChainOfThought(min_tokens=20, wait="wait", max_waits=30, max_tokens=24, answer_prompt="\nso ")
        solution = solve_one(strategy, task=task, seed=seed)
        path = [solution.tree.nodes[i] for i in solution.tree.path(len(solution.tree.nodes) - 1)][1:]
        assert "".join(node.text for node in path) == solution.text
        is_short = sum(node.num_tokens for node in free.tree.nodes[1:]) < 20
        assert is_short == any(node.text == "wait" for node in path)
        waited += is_short
        thoughts = [node.num_tokens for node in path]
        if path[-2].text == "\nso ":
            forced += 1
            thoughts = thoughts[:-2]
        assert 20 <= sum(thoughts) < 24 + wait_tokens
    assert waited
    assert forced


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_goes_on_after_an_answer(seed):
    task = Answered(max_new_tokens=60)
    free = solve_one(td.ChainOfThought(), task=task, seed=seed)
    least = sum(node.num_tokens for node in nodes_of(free)) + 8
    solution = solve_one(td.ChainOfThought(min_tokens=least, wait="wait", max_waits=30), task=task, seed=seed)
    steps = nodes_of(solution)
    assert sum(step.num_tokens for step in steps) >= least
    kinds = [step.kind for step in steps]
    assert "given" in kinds
    assert "generated" in kinds[kinds.index("given") :]


def test_a_minimum_above_the_limit_of_the_task_is_refused():
    with pytest.raises(ValueError, match="min_tokens: expected at most 14, all that the task allows, got 15"):
        solve_one(td.ChainOfThought(min_tokens=15))


@pytest.mark.parametrize("room", [0, 1, 5, 6, 7, 8, 20])
def test_a_chain_fills_the_little_room_that_its_prompt_leaves(room):
    """Thought, and what forces the answer, share what the model has left."""
    task = FakeTask(end=("nothing",), max_new_tokens=50)
    [problem] = task.problems(1)
    dec = talkative_decoder()
    prompt = dec.encode(problem.prompt)
    limit = dec.engine.table.max_tokens
    prompt = (prompt * limit)[: limit - 1 - room]
    strategy = td.ChainOfThought(min_tokens=40, max_tokens=45, answer_prompt="\nso ", wait="wait")
    [solution] = td.solve(dec, [problem], strategy=strategy, task=task, prompt=lambda _: prompt).solutions
    assert 0 < sum(node.num_tokens for node in nodes_of(solution)) <= room + 1
    dec.check_integrity()


def test_a_forced_answer_is_where_the_tree_says():
    task = FakeTask(end=("nothing",), max_new_tokens=50)
    solution = solve_one(td.ChainOfThought(max_tokens=9, answer_prompt="\nso ", answer_tokens=5), task=task)
    [answer] = [i for i, node in enumerate(solution.tree.nodes) if node.status == "answer"]
    assert solution.tree.text(answer) == solution.text
    assert "\nso " in solution.text
