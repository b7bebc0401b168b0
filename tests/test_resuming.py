"""What a journal goes by: a run goes on with solutions of the same run alone."""

import asyncio
from dataclasses import dataclass

import pytest
from fake_task import Lines

from treedecode.solving import solve_async
from treedecode.strategies import SelfConsistency
from treedecode.tasks import Problem


@dataclass(frozen=True)
class Weighted:
    """A scorer that holds a function, whose repr has an address."""

    function: object
    probability = False

    async def __call__(self, frontier, problem):
        return await frontier.score(lambda texts: [self.function(text) for text in texts])


def length():
    """A new function each time, as in every process."""

    def measure(text):
        return len(text)

    return measure


@pytest.fixture
def run(make_decoder, tmp_path):
    def run(name=None, prompt=None, verifier=None):
        decoder = make_decoder()
        if name is not None:
            decoder.model.model = type("Loaded", (), {"name_or_path": name})()
        work = solve_async(
            decoder,
            [Problem("one", "make one"), Problem("two", "make two")],
            strategy=SelfConsistency(num_samples=2),
            task=Lines(),
            verifier=verifier,
            prompt=prompt,
            journal=str(tmp_path / "journal.jsonl"),
        )
        before = decoder.stats.num_forwards
        asyncio.run(work)
        return decoder.stats.num_forwards - before

    return run


def test_a_function_is_the_same_in_the_next_process(run):
    first, second = Weighted(length()), Weighted(length())
    assert repr(first) != repr(second)
    assert run(verifier=first) > 0
    assert run(verifier=second) == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": lambda problem: "an example, then " + problem.prompt}, "prompts was"),
        ({"name": "another/model"}, "model was"),
    ],
)
def test_what_no_setting_says_counts_too(run, changed, named):
    assert run() > 0
    with pytest.raises(ValueError, match=f"of another run: {named}"):
        run(**changed)
    assert run() == 0


def test_a_prompt_is_what_it_reads_as_text_or_tokens(run):
    tokens = {"one": [2, 3], "two": [4, 5]}
    assert run(prompt=lambda problem: tokens[problem.id]) > 0
    assert run(prompt=lambda problem: tuple(tokens[problem.id])) == 0
    with pytest.raises(ValueError, match="prompts was"):
        run(prompt=lambda problem: tokens["one"])
