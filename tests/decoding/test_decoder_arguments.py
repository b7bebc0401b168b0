"""Calls that a decoder refuses: each says why, and leaves the decoder and its other work as they were."""

import asyncio

import pytest
from support.fakes import FakeModel, next_logits

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


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([-1, 3], ValueError, r"mask: expected indices from 0 to 3, got \[-1, 3\]"),
        ([4], ValueError, "mask: expected indices from 0 to 3"),
        ([1, 1], ValueError, "mask: an index appears twice"),
        ([[0, 1]], TypeError, r"mask: expected \[n\] booleans or indices"),
        ([[True] * 4], TypeError, r"mask: expected \[n\] booleans or indices"),
        ([0.7], TypeError, r"mask: expected \[n\] booleans or indices"),
        (1, TypeError, r"mask: expected \[n\] booleans or indices"),
        (["a"], TypeError, r"mask: expected \[n\] booleans or indices"),
        ([True], ValueError, "mask: expected 4 entries, got 1"),
    ],
)
def test_bad_masks_hold_nothing(make_decoder, mask, error, message):
    dec = make_decoder()

    async def run():
        with await dec.roots([[2], [3], [4], [5]]) as frontier:
            with pytest.raises(error, match=message):
                frontier.select(mask)
            assert dec.engine.table.handles[frontier.branches].tolist() == [1] * 4
            assert len(frontier.select([])) == len(frontier.select([False] * 4)) == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f.fork(2.7), TypeError, "width: expected an int"),
        (lambda f: f.fork(True), TypeError, "width: expected an int"),
        (lambda f: f.fork("2"), TypeError, "width: expected an int"),
        (lambda f: f.fork([1, 2]), ValueError, "width: expected an int, or 3, one for each branch"),
        (lambda f: f.fork_at(1.9), TypeError, "position: expected an int"),
        (lambda f: f.append([[1.5]] * 3), TypeError, r"text\[0\]: expected a string or token ids"),
        (lambda f: f.append([None] * 3), TypeError, r"text\[0\]: expected a string or token ids"),
        (lambda f: f.append(None), TypeError, "text: expected strings or token ids, got NoneType"),
        (lambda f: f.append(b"abc"), TypeError, "text: expected strings or token ids, got bytes"),
        (lambda f: f.append([True] * 3), TypeError, r"text\[0\]: expected a string or token ids"),
    ],
)
def test_bad_arguments_change_nothing(make_decoder, call, error, message):
    async def run():
        with await make_decoder().roots([[2], [3], [4]]) as frontier:
            with pytest.raises(error, match=message):
                call(frontier)
            assert frontier.num_tokens.tolist() == [1, 1, 1]

    asyncio.run(run())


def test_bad_arguments_of_coroutines(make_decoder):
    async def run():
        dec = make_decoder()
        with pytest.raises(TypeError, match=r"sampling: expected a treedecode\.Sampling, got dict"):
            await dec.roots("the", sampling={})
        with await dec.roots("the") as frontier:
            with pytest.raises(TypeError, match=r"sampling: expected a treedecode\.Sampling, got dict"):
                await frontier.extend(sampling={})
            with pytest.raises(ValueError, match="num_samples: expected an int >= 1, got 0"):
                await frontier.score(len, judge="a", num_samples=0)

    asyncio.run(run())


def test_an_empty_frontier_takes_text(make_decoder):
    async def run():
        with await make_decoder().roots("the") as frontier, frontier.select([]) as empty:
            for text in ("a", [2, 3], []):
                assert empty.append(text).texts() == []

    asyncio.run(run())
