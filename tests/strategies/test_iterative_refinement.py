"""Iterative refinement: critiques by the model and by the verifier, and the end of the passes."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.fake_task import FakeTask, Recorder
from support.strategy_cases import TASK, Agreeing, solve_one

import treedecode as td
from treedecode.search.search import Outcome
from treedecode.tasks import Problem


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


def test_refinement_ends_where_the_model_has_no_room_for_another_pass():
    """A critique, a request and a solution would need more tokens than the decoder has left."""
    asked = Recorder()
    long = td.IterativeRefinement(critique_prompt="\nbad " * 40, revise_prompt="\nnew ", max_passes=9, good=None)
    solution = solve_one(long, asked)
    assert 1 < len(asked.calls) < 6, "some of nine passes"
    assert (solution.text, solution.score) in [one for [one] in asked.calls]
