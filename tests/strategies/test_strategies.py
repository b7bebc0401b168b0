"""What each strategy chooses, against its paper's formulas, worked examples and brute force."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from support.fake_task import FakeTask, Recorder, rate, talkative_decoder
from support.fakes import FakeTokenizer
from support.strategy_cases import ENDLESS, TASK, parents_of, solve_one

import treedecode as td
from treedecode.search.search import Outcome
from treedecode.strategies.puct import PuctNode, exploration
from treedecode.strategies.self_consistency import leads
from treedecode.tasks import Problem

# -- self-consistency, best of n --


@pytest.mark.parametrize(("first", "second"), [(1, 0), (2, 1), (3, 3), (9, 2), (30, 10)])
def test_the_beta_posterior_is_its_integral(first, second):
    p = np.linspace(0, 1, 200_001)
    density = p**first * (1 - p) ** second
    expected = np.trapezoid(density[100_000:], p[100_000:]) / np.trapezoid(density, p)
    assert leads(np.array([second, first, 0])) == pytest.approx(expected, abs=1e-6)


class Agreeing(FakeTask):
    def extract(self, text):
        return "yes"


@pytest.mark.parametrize(("stop", "chains"), [("never", 12), ("window", 3), ("beta", 6)])
def test_chains_that_agree_end_early(stop, chains):
    # Beta: 1 - 2**-(a + 1) >= 0.95 from a = 4 on; chains come 3 at a time, and some have no answer
    strategy = td.SelfConsistency(num_samples=12, stop=stop, window=3)
    solution = solve_one(strategy, task=Agreeing(end=("a", "e", "i", "o", "u", "t", " ", "r", "s"), max_new_tokens=60))
    assert len(solution.tree.leaves()) == chains
    assert solution.answer == "yes"
    assert solution.score == 1


def test_the_best_and_the_weighted_answer():
    differ = 0
    for seed in range(6):
        asked = Recorder()
        best = solve_one(td.BestOfN(num_samples=12), asked, seed=seed)
        weighted = solve_one(td.BestOfN(num_samples=12, answer="weighted"), seed=seed)
        leaves = [best.tree.nodes[i] for i in best.tree.leaves()]
        done = [
            (node.score, TASK.extract(text))
            for node in leaves
            if (text := best.tree.text(best.tree.nodes.index(node))).endswith(".") or node.ended
        ]
        answered = [(score, answer) for score, answer in done if answer is not None]
        assert (best.score, best.answer) == max(answered)
        sums = {name: sum(score for score, answer in answered if answer.lower() == name) for name in "abc"}
        assert weighted.answer.lower() == max(sums, key=sums.get)
        differ += best.answer.lower() != weighted.answer.lower()
    assert differ


def test_weighted_votes_refuse_negative_scores():
    with pytest.raises(ValueError, match="verifier: weighted votes need scores >= 0, got -"):
        solve_one(td.BestOfN(num_samples=3, answer="weighted"), Recorder(lambda problem, text: -len(text) - 1.0))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_are_finite(score):
    for strategy in (td.BestOfN(num_samples=3), td.REBASE(width=3), td.MCTS(num_simulations=2, width=2)):
        with pytest.raises(ValueError, match="verifier: expected a finite number for every branch, got"):
            solve_one(strategy, Recorder(lambda problem, text: score if "e" in text else 0.5))


# -- beams over steps, DVTS, tree of thoughts --


def test_beams_go_on_from_the_best():
    asked = Recorder()
    solve_one(td.StepBeamSearch(num_beams=6, width=3), asked, task=ENDLESS)
    assert [len(call) for call in asked.calls[:2]] == [6, 6]
    for before, children in parents_of(asked.calls[:3]):
        best = sorted(before, key=lambda one: -one[1])[:2]
        assert [count > 0 for count in children] == [one in best for one in before]


def test_lookahead_rates_the_steps_further_on():
    plain, ahead = Recorder(), Recorder()
    task = ENDLESS
    solve_one(td.StepBeamSearch(num_beams=2, width=2), plain, task=task)
    solve_one(td.StepBeamSearch(num_beams=2, width=2, lookahead=2), ahead, task=task)
    for (step, _), (rolled, _) in zip(plain.calls[0], ahead.calls[0], strict=True):
        assert rolled.startswith(step)
        assert len(FakeTokenizer().encode(rolled)) > len(FakeTokenizer().encode(step))


def test_trees_of_dvts_know_nothing_of_each_other():
    asked, task = Recorder(), ENDLESS
    solve_one(td.DVTS(num_beams=6, width=2), asked, task=task)
    first = [text for text, _ in asked.calls[0]]

    def other(problem, text):
        score = rate(problem, text)
        return 1 - score if any(text.startswith(begin) for begin in first[:2]) else score

    changed = Recorder(other)
    solve_one(td.DVTS(num_beams=6, width=2), changed, task=task)
    for before, after in zip(asked.calls, changed.calls, strict=True):
        assert len(before) == len(after) == 6
        assert before[2:] == after[2:]
    assert asked.calls[1][:2] != changed.calls[1][:2]
    for before, children in parents_of(asked.calls[:3]):
        for i in range(0, 6, 2):
            pair = [score for _, score in before[i : i + 2]]
            assert (children[i] > 0, children[i + 1] > 0) == (pair[0] >= pair[1], pair[0] < pair[1])


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


# -- budget forcing, refinement --


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


def passes(**settings):
    return td.IterativeRefinement(critique_prompt="\nbad ", revise_prompt="\nnew {problem}", **settings)


def test_refinement_keeps_the_best_and_shows_the_verifier_solutions():
    asked = Recorder()
    settings = {"max_passes": 4, "critique_tokens": 3, "good": None, "max_repeats": 99}
    solution = solve_one(passes(**settings), asked)
    tried = [call[0] for call in asked.calls]
    assert len(tried) == 5
    assert all("bad" not in text and "new" not in text for text, _ in tried)
    answered = [(score, text) for text, score in tried if TASK.extract(text) is not None and text.endswith(".")]
    if answered:
        assert solution.score >= max(answered)[0]
    given = [node.text for node in solution.tree.nodes if node.kind == "given"]
    assert given.count("\nbad ") == given.count("\nnew " + TASK.problems(1)[0].prompt) == 4


def test_prompts_of_refinement_name_problem_and_solution():
    search = SimpleNamespace(
        problem=Problem("1", "2 {solution}"), decoder=SimpleNamespace(encode=lambda text, special: text)
    )
    prompt = r"{problem}: {solution} is wrong, \boxed{}"
    found = passes()._filled(search, prompt, Outcome("5", "2 + 3 {problem}"))
    assert found == r"2 {solution}: 2 + 3 {problem} is wrong, \boxed{}"


def test_refinement_ends_when_it_is_good_or_repeats_itself():
    good = Recorder(lambda problem, text: 1.0)
    task, asked = Agreeing(end=tuple("aeioutrs "), max_new_tokens=60), Recorder()
    solve_one(passes(max_passes=5), good, task=task)
    assert len(good.calls) == 1
    solve_one(passes(max_passes=5, critique_tokens=3), asked, task=task)
    assert len(asked.calls) == 2


class Silent(FakeTask):
    def extract(self, text):
        return None


@pytest.mark.parametrize("prompts", [{}, {"critique_prompt": ""}])
def test_a_text_without_an_answer_is_never_good_enough(prompts):
    asked = Recorder(lambda problem, text: 1.0)
    strategy = td.IterativeRefinement(
        **{"critique_prompt": "\nbad ", "revise_prompt": "\nnew ", **prompts}, max_passes=3
    )
    solve_one(strategy, asked, task=Silent(end=tuple("aeiou"), stop="nothing", max_step_tokens=14))
    assert len(asked.calls) == 4, "a solution is one step here, and three passes follow the first"


@pytest.mark.parametrize("doubt", [None, 0.5])
def test_the_worst_step_of_the_best_is_written_anew(doubt):
    asked, task = Recorder(), Silent(stop="nothing", end=("nothing",), max_step_tokens=3)
    strategy = td.IterativeRefinement(critique_prompt="", max_passes=4, good=None, doubt=doubt)
    solution = solve_one(strategy, asked, task=task)
    steps = [call[0] for call in asked.calls]
    best, passes = [], 0
    while steps:
        scores = [score for _, score in best]
        doubtful = [i for i, score in enumerate(scores) if doubt is not None and score < doubt]
        kept = best[: (doubtful or [int(np.argmin(scores))])[0]] if best else []
        tried = list(kept)
        while steps and (len(tried) == len(kept) or steps[0][0].startswith(tried[-1][0])):
            assert steps[0][0].startswith(tried[-1][0] if tried else "")
            tried.append(steps.pop(0))
        if not best or tried[-1][1] > best[-1][1]:
            best = tried
        passes += 1
    assert passes == 5
    assert (solution.text, solution.score) == best[-1]


# -- MCTS --


def test_puct_by_hand():
    root = PuctNode()
    often = PuctNode(parent=root, prior=0.25)
    once = PuctNode(parent=root, prior=0.75)
    root.children = [often, once]
    often.back_up(0.9)
    often.back_up(0.75, 2)  # drawn twice
    once.back_up(0.2)
    assert (root.visits, root.total) == (4, pytest.approx(2.6))
    assert (often.q, once.q) == (pytest.approx(0.8), 0.2)
    c = exploration(4, 1.25, 19652)
    assert c == pytest.approx(1.25 + math.log(19657 / 19652))
    assert often.puct(c, 0.2, 1.0) == pytest.approx(0.75 + c * 0.25 * 2 / 4)
    assert once.puct(c, 0.2, 1.0) == pytest.approx(0.0 + c * 0.75 * 2 / 2)
    once.add_pending(5)
    assert once.puct(c, 0.2, 1.0) == pytest.approx(c * 0.75 * 3 / 7), "a visit under way changes no value"
    assert often.puct(c, 0.2, 1.0) > once.puct(c, 0.2, 1.0)
    assert often.puct(c, 0.5, 0.5) == pytest.approx(c * 0.25 * 3 / 4), "nothing to compare yet"


def test_mcts_expands_what_puct_says():
    asked, simulations, depth = Recorder(), 14, 5
    strategy = td.MCTS(num_simulations=simulations, width=2, parallel=1, answer="visits")
    solution = solve_one(strategy, asked, task=ENDLESS)
    calls = list(asked.calls)
    children, value, visits, total = {"": []}, {}, {"": 0}, {"": 0.0}

    def path_of(text):
        return [above for above in visits if text.startswith(above)]

    for _ in range(simulations):
        leaf = ""
        means = [total[one] / visits[one] for one in value]
        low, high = min(means, default=0), max(means, default=0)
        while children.get(leaf):
            n, siblings = visits[leaf], children[leaf]
            c = 1.25 + math.log((19653 + n) / 19652)
            q = [(total[one] / visits[one] - low) / (high - low) for one in siblings]
            u = [c * math.sqrt(n) / (1 + visits[one]) / len(siblings) for one in siblings]
            leaf = siblings[int(np.argmax(np.add(q, u)))]
        if len(path_of(leaf)) == depth + 1:  # 14 tokens, three a step
            backed_up = [(leaf, value[leaf])]
        else:
            backed_up = calls.pop(0)
            assert all(text.startswith(leaf) for text, _ in backed_up), "another leaf was expanded"
            children[leaf] = [text for text, _ in backed_up]
        for text, score in backed_up:
            value[text] = score
            visits.setdefault(text, 0)
            total.setdefault(text, 0.0)
            for above in path_of(text):
                visits[above] += 1
                total[above] += score
    leaf = ""
    while children.get(leaf):
        leaf = max(children[leaf], key=lambda one: (visits[one], value[one]))
    assert solution.text.startswith(leaf)
    assert len(calls) == (0 if len(path_of(leaf)) == depth + 1 else 1), "what is left is the score of the whole"


def test_equal_steps_are_one_child_that_is_backed_up_for_each():
    roots = []

    class Watched(td.MCTS):
        def _select(self, root):
            roots.append(root)
            return super()._select(root)

    settings = {"num_simulations": 1, "width": 12, "sampling": td.Sampling(temperature=0.5)}
    solve_one(Watched(**settings), task=FakeTask(max_step_tokens=1))
    [root] = roots
    assert 1 < len(root.children) < 12, "some of the steps are equal"
    assert root.visits == 12
    for child in root.children:
        assert child.visits == round(12 * child.prior)
        assert child.q == pytest.approx(child.value)
    assert root.q == pytest.approx(sum(child.prior * child.value for child in root.children))


def test_the_answer_is_the_best_or_the_most_visited():
    for answer in ("value", "visits"):
        asked = Recorder()
        solution = solve_one(td.MCTS(num_simulations=12, width=3, parallel=3, answer=answer), asked)
        scores = {text: score for call in asked.calls for text, score in call}
        assert scores[solution.text] == solution.score
        if answer == "value":
            done = {text for text in scores if text.endswith(".") and TASK.extract(text) is not None}
            assert solution.score >= max(scores[text] for text in done)


# -- settings --


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: td.BestOfN(num_samples=0), ValueError, "num_samples: expected a number >= 1, got 0"),
        (lambda: td.BestOfN(answer="majority"), ValueError, "answer: expected one of 'best', 'weighted', got"),
        (lambda: td.StepBeamSearch(num_beams=6, width=4), ValueError, "num_beams: expected a multiple of the width 4"),
        (lambda: td.DVTS(lookahead=-1), ValueError, "lookahead: expected a number >= 0, got -1"),
        (lambda: td.REBASE(temperature=0), ValueError, "temperature"),
        (lambda: td.ETS(kv_weight=-1), ValueError, "kv_weight: expected a number >= 0"),
        (lambda: td.MCTS(evaluate="guess"), ValueError, "evaluate: expected one of 'verifier', 'rollout', got 'guess'"),
        (lambda: td.MCTS(width=2.5), TypeError, "width: expected an int, got 2.5"),
        (lambda: td.ParticleFilter(ess_threshold=2), ValueError, "ess_threshold: expected a number from 0 to 1"),
        (lambda: td.IterativeRefinement(good="1"), TypeError, "good: expected a number, got '1'"),
        (lambda: td.IterativeRefinement(good=math.nan), ValueError, "good: expected a number, got nan"),
        (lambda: td.IterativeRefinement(doubt=True), TypeError, "doubt: expected a number, got True"),
        (lambda: td.TreeOfThoughts(dead="a"), TypeError, "dead: expected a number, got 'a'"),
        (lambda: td.TreeOfThoughts(dead=math.nan), ValueError, "dead: expected a number, got nan"),
        (lambda: td.IterativeRefinement(revise_prompt=""), ValueError, "revise_prompt: is empty"),
        (lambda: td.IterativeRefinement(critique_stop="no"), TypeError, "critique_stop: expected a tuple of strings"),
    ],
)
def test_settings_are_checked(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("name", [name for name, one in td.strategies.STRATEGIES.items() if one.needs_verifier])
def test_who_scores_branches_needs_a_verifier(name):
    with pytest.raises(ValueError, match=f"verifier: {name} scores branches and needs one"):
        td.solve(talkative_decoder(), TASK.problems(1), strategy=td.strategies.STRATEGIES[name](), task=TASK)
