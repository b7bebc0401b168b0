"""What `solve` is given, refused before anything has been spent; and the names it goes by."""

import asyncio
import inspect

import pytest
from fake_task import FakeTask, talkative_decoder
from gates import gate

import treedecode as td

TASK = FakeTask()


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
    here = solve(TASK.problems(2), **settings)
    assert [one.text for one in here.solutions] == [one.text for one in there.solutions]
    assert [one.correct for one in seen] == [None] * 4


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
        ({"task": None}, TypeError, "task: expected a treedecode.tasks.Task, got None without name, stop, end"),
        ({"prompt": lambda problem: ""}, ValueError, "problems: the prompt of 'test/0' is empty"),
        ({"prompt": lambda problem: 5}, TypeError, "problems: the prompt of 'test/0': expected a string or token ids"),
        ({"prompt": lambda problem: [-1]}, ValueError, "problems: the prompt of 'test/0': expected token ids from 0"),
    ],
)
def test_what_is_no_problem_or_task(arguments, error, match):
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
