"""Calls that cannot be served: each says why, and leaves the decoder and what runs on it as they were."""

import asyncio

import pytest
from fakes import FakeModel, next_logits

import treedecode as td

GREEDY = td.Sampling(temperature=0)
ENDLESS = td.Sampling(seed=1, ignore_eos=True)


async def extending(frontier, **options):
    """A task that extends, a few tokens in."""
    task = asyncio.create_task(frontier.extend(**options))
    for _ in range(6):
        await asyncio.sleep(0)
    assert frontier.token_ids()[0]
    return task


def test_nothing_is_appended_to_a_branch_that_decodes(make_decoder):
    dec = make_decoder(FakeModel(eos_logit=-99.0))

    async def run():
        with await dec.roots([[2, 3]]) as frontier:
            task = await extending(frontier, max_new_tokens=10, sampling=GREEDY)
            with pytest.raises(RuntimeError, match="already being extended"):
                frontier.append([5, 6])
            await task
            frontier.append([5, 6])
            await frontier.extend(max_new_tokens=2, sampling=GREEDY)
            return [2, 3, *frontier.token_ids()[0]]

    ids = asyncio.run(run())
    sampled = [*range(2, 12), 14, 15]
    assert [ids[i] for i in sampled] == [int(next_logits(ids[:i], eos_logit=-99.0).argmax()) for i in sampled]


def test_an_extend_that_is_refused_does_not_reseed(make_decoder):
    async def run(dec, *, disturbed):
        with await dec.roots("the", sampling=ENDLESS) as frontier:
            task = await extending(frontier, max_new_tokens=10)
            if disturbed:
                with pytest.raises(RuntimeError, match="already being extended"):
                    await frontier.extend(sampling=td.Sampling(seed=99))
            await task
            await frontier.extend(max_new_tokens=5)
            return frontier.token_ids()

    assert asyncio.run(run(make_decoder(), disturbed=True)) == asyncio.run(run(make_decoder(), disturbed=False))
