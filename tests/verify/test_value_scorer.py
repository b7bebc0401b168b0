"""Value: frontiers that wait together are scored in one evaluation, with the scores that each would have alone."""

import asyncio

import numpy as np
import pytest
import torch
from support.tiny_model import save_tiny_model

import treedecode as td
from treedecode.models.value_head import ValueHead
from treedecode.tasks.base import Problem
from treedecode.verify.value import Value

PROBLEM = Problem("p", "Use")
PROMPTS = ["Use 1 2", "a dog", "the", "0123"]


@pytest.fixture(scope="module")
def dec(tmp_path_factory):
    with td.Decoder.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")), kv_memory="1MiB") as decoder:
        yield decoder


@pytest.fixture
def head():
    torch.manual_seed(0)
    return ValueHead(32, width=16).eval()


class Counted(Value):
    """Remembers how many rows every evaluation had."""

    def __init__(self, head):
        super().__init__(head)
        self.rows = []

    def _values(self, hidden):
        self.rows.append(len(hidden))
        return super()._values(hidden)


async def _scored(dec, value, prompt, width):
    with await dec.roots([prompt]) as root, root.fork(width) as frontier:
        await frontier.extend(max_new_tokens=3, sampling=td.Sampling(seed=7))
        return await value(frontier, PROBLEM), frontier.scores, await frontier.hidden()


def test_frontiers_that_wait_together_are_scored_together_and_as_if_alone(dec, head):
    alone = [dec.run(_scored(dec, Value(head), prompt, i + 1)) for i, prompt in enumerate(PROMPTS)]
    value = Counted(head)

    async def everything():
        return await asyncio.gather(*(_scored(dec, value, prompt, i + 1) for i, prompt in enumerate(PROMPTS)))

    together = dec.run(everything())
    assert value.rows == [1 + 2 + 3 + 4]
    for (one, scores, hidden), (other, *_) in zip(together, alone, strict=True):
        assert np.array_equal(one, other)
        assert np.array_equal(one, scores)
        np.testing.assert_allclose(one, head(hidden.clone()).detach().numpy(), rtol=1e-5)


def test_a_cancelled_frontier_leaves_the_others_their_scores(dec, head):
    value = Counted(head)

    async def some():
        tasks = [asyncio.ensure_future(_scored(dec, value, prompt, 2)) for prompt in PROMPTS]
        while not value._waiting:
            await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = dec.run(some())
    assert isinstance(first, asyncio.CancelledError)
    assert value.rows == [6]
    assert all(len(scores) == 2 for scores, *_ in others)


def test_an_error_of_the_head_reaches_all_that_wait(dec):
    value = Value(ValueHead(31))

    async def everything():
        waiting = (_scored(dec, value, prompt, 1) for prompt in PROMPTS)
        return await asyncio.gather(*waiting, return_exceptions=True)

    for error in dec.run(everything()):
        assert isinstance(error, ValueError)
        assert str(error).startswith("hidden: expected [n, 31]")


def test_scores_follow_the_weights(dec, head):
    value = Value(head)
    before, _, hidden = dec.run(_scored(dec, value, "the", 2))
    with torch.no_grad():
        head.out.bias += 1
    after, *_ = dec.run(_scored(dec, value, "the", 2))
    assert (after > before).all()
    np.testing.assert_allclose(after, head(hidden.clone()).detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("sizes", [(32, 16), (32, 15), (31, 16)])
def test_the_fast_forward_is_the_forward(sizes):
    head = ValueHead(*sizes)
    hidden = torch.randn(9, sizes[0])
    fast = head.fast()
    with torch.inference_mode():
        torch.testing.assert_close(fast(hidden), head(hidden))
        if all(size % 2 == 0 for size in sizes):
            assert torch.equal(torch.cat([fast(row[None]) for row in hidden]), fast(hidden))
