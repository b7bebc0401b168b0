"""Arguments of `solve`: wrong ones are refused before anything is spent."""

import asyncio
import inspect
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
from support.fake_task import FakeTask, talkative_decoder
from support.gates import gate

import treedecode as td
from treedecode.tasks import load

TASK = FakeTask()


class Named(FakeTask):
    """Gives problems that name it as their task."""

    def problems(self, *arguments, **settings):
        return [replace(problem, task=self) for problem in super().problems(*arguments, **settings)]


LINES = Named()


def solve(problems=None, task=TASK, **settings):
    dec = talkative_decoder()
    problems = TASK.problems(8) if problems is None else problems
    try:
        return td.solve(dec, problems, strategy=td.SelfConsistency(2), task=task, **settings)
    finally:
        solve.num_forwards = len(dec.model.forwards)


def test_solve_and_solve_async_have_the_same_arguments():
    assert inspect.signature(td.solve) == inspect.signature(td.solve_async)
    seen = []
    settings = {"seed": 7, "grade": False, "prompt": lambda problem: "the cat", "callback": seen.append}
    dec = talkative_decoder()
    there = asyncio.run(td.solve_async(dec, TASK.problems(2), strategy=td.SelfConsistency(2), task=TASK, **settings))
    here = solve(TASK.problems(2), **{**settings, "seed": np.int64(7)})
    assert [one.text for one in here.solutions] == [one.text for one in there.solutions]
    assert [one.correct for one in seen] == [None] * 4


def test_solve_shows_its_arguments_and_refuses_others():
    parameters = inspect.signature(td.solve).parameters
    assert list(parameters)[:3] == ["decoder", "problems", "strategy"]
    assert (parameters["strategy"].default, parameters["seed"].default) == (inspect.Parameter.empty, 0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'verifer'"):
        solve(verifer=None)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'strategy'"):
        td.solve(talkative_decoder(), TASK.problems(1))


def test_the_task_of_the_problems_is_the_default():
    given = solve(LINES.problems(3), task=LINES)
    found = solve(LINES.problems(3), task=None)
    assert [one.answer for one in found.solutions] == [one.answer for one in given.solutions]
    task = load("countdown")
    assert all(problem.task is task for problem in task.problems(3))


def test_a_problem_goes_to_other_processes_alone():
    [problem] = load("countdown").problems(1)
    again = pickle.loads(pickle.dumps(problem))
    assert again == problem
    assert again.task is None


def test_little_room_for_solutions_is_a_warning():
    prompts = {"test/0": [5] * 500, "test/1": [5] * 503}
    settings = {"prompt": lambda problem: prompts.get(problem.id, [5] * 498)}
    with pytest.warns(UserWarning, match=r"2 of 8 prompts leave a solution fewer than the 14 tokens .* 512 in all"):
        solve(**settings)
    with warnings.catch_warnings(action="error"):
        solve(prompt=lambda problem: [5] * 498)


@pytest.mark.parametrize("long", [[3], [0, 2, 4], range(8)])
def test_prompts_that_are_too_long_are_named(long):
    problems = TASK.problems(8)
    ids = {problems[i].id for i in long}
    with pytest.raises(
        ValueError, match=r"problems: prompts leave no room for a solution in the .* there are"
    ) as error:
        solve(problems, prompt=lambda problem: [5] * (600 if problem.id in ids else 5))
    assert solve.num_forwards == 0
    named = [problem.id for problem in problems if repr(problem.id) in str(error.value)]
    assert named == [problems[i].id for i in long][:5]
    assert ("and 3 more" in str(error.value)) == (len(long) == 8)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"problems": ["hello"]}, TypeError, "problems: expected a list of treedecode.Problem, got 'hello' at 0"),
        ({"problems": "hello"}, TypeError, "problems: expected a list of treedecode.Problem, got 'hello'"),
        ({"problems": 3}, TypeError, "problems: expected a list of treedecode.Problem, got 3"),
        ({"problems": [td.Problem("a", "the"), td.Problem("a", "cat")]}, ValueError, "problems: two have the same id"),
        (
            {"task": "countdown"},
            TypeError,
            r"task: expected a task, such as .*load\('countdown'\) gives, got 'countdown'",
        ),
        ({"task": FakeTask}, TypeError, "task: expected a task, such as .* got <class"),
        ({"task": 5}, TypeError, "task: expected a treedecode.tasks.Task, got 5 without name, stop, end"),
        ({"task": None}, ValueError, "task: the problems are not of one task, or do not say of which"),
        (
            {"task": None, "problems": [*LINES.problems(2), *TASK.problems(3)[2:]]},
            ValueError,
            "task: the problems are not",
        ),
        ({"problems": [td.Problem("a\ud800", "the")]}, ValueError, "problems: the id at 0: is no Unicode text"),
        ({"problems": [td.Problem("a", "the\udc00")]}, ValueError, "problems: the prompt of 'a': is no Unicode text"),
        ({"problems": [td.Problem(5, "the")]}, TypeError, "problems: the id at 0: expected a string, got 5"),
        ({"problems": [], "task": None}, ValueError, "task: the problems are not of one task, or do not say of which"),
        ({"seed": "a"}, TypeError, "seed: expected an int, got 'a'"),
        ({"seed": None}, TypeError, "seed: expected an int, got None"),
        ({"seed": True}, TypeError, "seed: expected an int, got True"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got 1.5"),
        ({"prompt": lambda problem: ""}, ValueError, "problems: the prompt of 'test/0' is empty"),
        ({"prompt": lambda problem: 5}, TypeError, "problems: the prompt of 'test/0': expected a string or token ids"),
        ({"prompt": lambda problem: [-1]}, ValueError, "problems: the prompt of 'test/0': expected token ids from 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        solve(**arguments)
    assert solve.num_forwards == 0


def test_a_forecast_reads_the_file_of_a_gate(tmp_path):
    known = gate(None, TASK)
    known.save(tmp_path / "gate.safetensors")
    settings = {"strategy": td.SelfConsistency(4), "num_draws": 20}
    prompts = [problem.prompt for problem in TASK.problems(2)]
    expected = td.forecast(talkative_decoder(), prompts, gate=known, **settings)
    for path in (tmp_path / "gate.safetensors", str(tmp_path / "gate.safetensors")):
        assert (td.forecast(talkative_decoder(), prompts, gate=path, **settings).draws == expected.draws).all()
    assert isinstance(known, td.Gate)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: td.solve(1), r"^solve\(\) missing 1 required positional argument: 'problems'$"),
        (lambda: td.solve(1, 2, colour=4), r"^solve\(\) got an unexpected keyword argument 'colour'$"),
        (lambda: asyncio.run(td.solve_async(1, 2, colour=4)), r"^solve_async\(\) got an unexpected keyword"),
        (lambda: td.solve(1, 2, 3), r"^solve\(\) takes "),
    ],
)
def test_unknown_and_missing_arguments_name_the_function(call, message):
    with pytest.raises(TypeError, match=message):
        call()
