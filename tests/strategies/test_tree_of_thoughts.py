"""Tree of Thoughts: breadth first and depth first, with sampled and with proposed steps."""

import itertools

import pytest
from support import scripted
from support.fake_task import FakeTask, Recorder
from support.strategy_cases import ENDLESS, parents_of, solve_one

import treedecode as td
from treedecode.verify import Vote


@pytest.mark.parametrize("dead", [None, 0.5])
def test_breadth_first_keeps_the_best_that_live(dead):
    asked = Recorder()
    task = ENDLESS
    solve_one(td.TreeOfThoughts(depth=3, width=4, keep=2, dead=dead), asked, task=task)
    for before, children in parents_of(asked.calls[:3]):
        alive = [one for one in before if dead is None or one[1] >= dead] or before
        best = sorted(alive, key=lambda one: -one[1])[:2]
        assert [count > 0 for count in children] == [one in best for one in before]


class Ninth(FakeTask):
    """Texts of nine characters have come to their answer."""

    def is_final(self, text):
        return len(text) >= 9

    def extract(self, text):
        return text[8:9] or None


def test_depth_first_goes_into_the_best_child_and_back():
    asked, task = Recorder(), ENDLESS
    strategy = td.TreeOfThoughts(depth=2, width=3, keep=3, order="dfs", dead=0.4, max_visits=9)
    solve_one(strategy, asked, task=task)
    entered = []
    for call in asked.calls[1:]:
        [parent] = {old for old, _ in asked.calls[0] if call[0][0].startswith(old)}
        if parent not in entered:
            entered.append(parent)
    expected = sorted((one for one in asked.calls[0] if one[1] >= 0.4), key=lambda one: -one[1])
    assert entered == [text for text, _ in expected]
    strategy = td.TreeOfThoughts(depth=2, width=3, keep=3, order="dfs", good=0.0)
    enough, settings = Recorder(), {"stop": "nothing", "end": ("nothing",), "max_step_tokens": 3}
    solution = solve_one(strategy, enough, task=Ninth(**settings))
    assert len(enough.calls) == 3, "two levels and the first solution"
    assert solution.text == enough.calls[-1][0][0]
    unanswered = Recorder()
    solve_one(strategy, unanswered, task=task)
    assert len(unanswered.calls) > 3, "no solution is good without an answer"


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
    """Answers the question for next steps: of the root, and of states that have a line."""
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


def test_a_step_that_was_cut_off_is_left_out(monkeypatch):
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


def test_a_complete_solution_stays_one_of_the_states():
    num_kept = 0
    for seed in range(12):
        asked = Recorder(lambda problem, text: 1.0 if text.endswith(".") else len(text) / 100)
        solve_one(td.TreeOfThoughts(depth=4, width=3, keep=2), asked, seed=seed)
        for before, after in itertools.pairwise(asked.calls):
            complete = [text for text, _ in before if text.endswith(".")][:2]
            texts = [text for text, _ in after]
            assert [texts.count(text) for text in complete] == [1] * len(complete)
            num_kept += len(complete)
    assert num_kept > 3
