"""What a model is made to do: go on after an answer, answer now, list next steps."""

import pytest
from support import scripted
from support.fake_task import FakeTask, Recorder, talkative_decoder
from support.strategy_cases import solve_one

import treedecode as td
from treedecode.verify import Vote


class Answered(FakeTask):
    """Any text has come to an answer."""

    def is_final(self, text):
        return True


def nodes_of(solution):
    return [solution.tree.nodes[i] for i in solution.tree.path(len(solution.tree.nodes) - 1)][1:]


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


def test_more_than_the_task_allows_is_refused():
    with pytest.raises(ValueError, match="min_tokens: expected at most 14, all that the task allows, got 15"):
        solve_one(td.ChainOfThought(min_tokens=15))


@pytest.mark.parametrize("room", [0, 1, 5, 6, 7, 8, 20])
def test_a_prompt_that_leaves_little_room_still_gets_what_there_is(room):
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


class Steps(FakeTask):
    """Two lines are a solution."""

    def is_final(self, text):
        return text.count("\n") >= 2

    def extract(self, text):
        return text


STEPS = Steps(stop="\n", end=("\n\n",), max_step_tokens=20, max_new_tokens=60)
MARKER = "\nNext:\n"


def propose(monkeypatch, answer, *, verifier, task=STEPS, **settings):
    scripted.follow(monkeypatch, MARKER, answer)
    dec = scripted.fakes.fake_decoder(scripted.ScriptedModel(), tokenizer=scripted.ByteTokenizer(), num_pages=1000)
    strategy = td.TreeOfThoughts(generate="propose", propose_prompt=MARKER, **{"depth": 2, "keep": 2, **settings})
    result = td.solve(dec, task.problems(2), strategy=strategy, task=task, verifier=verifier)
    dec.check_integrity()
    assert dec.num_branches == 0
    return result.solutions


def listing(before):
    """What the model says to the root, and to those that have written a line."""
    if not before.endswith("\n"):
        return "1. apple\n(2) bread\n- apple\n3: cherry\n4) date"
    last = before.splitlines()[-1].rpartition(". ")[2]
    return f"* {last} and 2 + 2\n{last} alone\n" + "x" * 90 + "\n"


@pytest.mark.parametrize("order", ["bfs", "dfs"])
def test_proposals_are_the_children(monkeypatch, order):
    asked = Recorder(lambda problem, text: {"b": 0.9, "c": 0.8}.get(text[0], 0.1) + 0.05 * text.endswith("alone\n"))
    solutions = propose(monkeypatch, listing, verifier=asked, width=3, order=order)
    for solution in solutions:
        assert solution.text == "bread\nbread alone\n"
        nodes = solution.tree.nodes
        children = [node.text for node in nodes if node.parent == 0]
        assert children == ["apple\n", "bread\n", "cherry\n"], "the first three that differ, as text alone"
        below = [node.text for node in nodes if node.parent > 0 and nodes[node.parent].text == "bread\n"]
        assert below == ["bread and 2 + 2\n", "bread alone\n"], "and none that is too long"
        assert {node.kind for node in nodes[1:]} == {"given"}


def test_half_a_step_is_none(monkeypatch):
    asked = Recorder(lambda problem, text: {"b": 0.9}.get(text[0], 0.1))
    short = len("1. apple\n(2) bread\n- apple\n3: che")
    for solution in propose(monkeypatch, listing, verifier=asked, width=3, propose_tokens=short):
        nodes = solution.tree.nodes
        assert [node.text for node in nodes if node.parent == 0] == ["apple\n", "bread\n"]


def test_a_state_without_a_proposal_has_no_children(monkeypatch):
    def some(before):
        return "bread\ncherry" if not before.endswith("\n") else "" if before.endswith("bread\n") else "jam"

    high = Recorder(lambda problem, text: 0.9 if text.startswith("bread") else 0.5)
    for solution in propose(monkeypatch, some, verifier=high, width=2):
        assert solution.text == "cherry\njam\n"


def test_where_nothing_is_proposed_solutions_are_written_on(monkeypatch):
    scripted.follow(monkeypatch, ". ", lambda before: "toast\njam")  # after the prompt's own end
    spoken = scripted.fakes.next_logits

    def next_logits(tokens, vocab_size, eos_logit):
        said, asked, _ = scripted.ByteTokenizer().decode(tokens).partition(MARKER)
        return spoken(scripted.ByteTokenizer().encode("a. toast" if asked else said), vocab_size, eos_logit)

    monkeypatch.setattr(scripted.fakes, "next_logits", next_logits)
    monkeypatch.setattr(scripted, "follow", lambda *_: None)
    for solution in propose(monkeypatch, None, verifier=Recorder(), width=2):
        assert solution.text == "toast\njam\n\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generate": "guess"}, "generate: expected one of 'sample', 'propose', got 'guess'"),
        ({"propose_prompt": ""}, "propose_prompt: is empty"),
        ({"propose_tokens": 0}, "propose_tokens: expected"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        td.TreeOfThoughts(**settings)


def test_votes_are_no_part_of_the_tree(monkeypatch):
    scripted.follow(monkeypatch, ". ", lambda before: "toast\njam")
    dec = scripted.fakes.fake_decoder(scripted.ScriptedModel(), tokenizer=scripted.ByteTokenizer(), num_pages=1000)
    strategy = td.TreeOfThoughts(depth=1, width=2, keep=1)
    [solution] = td.solve(dec, STEPS.problems(1), strategy=strategy, task=STEPS, verifier=Vote(num_samples=2)).solutions
    assert [node.text for node in solution.tree.nodes[1:]] == ["toast\n", "toast\n", "jam\n\n"]
