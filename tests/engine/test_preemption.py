"""When pages run out: the prefix index gives way, then branches, and no text changes."""

import asyncio

import pytest
from support.fakes import FakeModel

import treedecode as td
from treedecode.cache.page_pool import OutOfBranches

PROMPTS = [list(range(2, 15)), list(range(2, 12)), [40, 41, 42], list(range(20, 45))]
SETTINGS = {"num_branches": 4, "sampling": td.Sampling(seed=11, ignore_eos=True), "max_new_tokens": 30}


@pytest.mark.parametrize(("page_size", "num_pages"), [(4, 60), (4, 17), (4, 14), (1, 56), (16, 10), (16, 4)])
def test_text_is_the_same_however_few_pages(make_decoder, page_size, num_pages):
    expected = make_decoder(num_pages=1000).generate(PROMPTS, **SETTINGS)
    dec = make_decoder(page_size=page_size, num_pages=num_pages, prefill_tokens=16)
    assert dec.generate(PROMPTS, **SETTINGS) == expected
    assert dec.stats.num_preemptions > 0


def test_the_prefix_index_goes_first(make_decoder):
    dec = make_decoder(num_pages=24, page_size=4)
    for first in range(2, 40, 5):
        dec.generate([[first] * 20], sampling=td.Sampling(temperature=0, ignore_eos=True), max_new_tokens=40)
    assert dec.stats.num_preemptions == 0
    assert len(dec.engine.store.index.pages()) > 0


def test_branches_at_rest_go_before_those_that_decode(make_decoder):
    dec = make_decoder(num_pages=26, page_size=4)
    ample = make_decoder(num_pages=400, page_size=4)

    async def search(dec):
        resting = await dec.roots([[2] * 20])
        await resting.extend(max_new_tokens=10, sampling=td.Sampling(temperature=0, ignore_eos=True))
        busy = await dec.roots([[3] * 20])
        busy = busy.fork(3)
        await busy.extend(max_new_tokens=20, sampling=td.Sampling(seed=0, ignore_eos=True))
        preempted = dec.stats.num_preemptions
        assert preempted == (dec.engine.table.num_cached[resting.branches] == 0)
        await resting.extend(max_new_tokens=10, sampling=td.Sampling(temperature=0, ignore_eos=True))
        return resting.token_ids(), busy.token_ids(), preempted

    *texts, preempted = asyncio.run(search(dec))
    *expected, none = asyncio.run(search(ample))
    assert texts == expected
    assert preempted == 1
    assert none == 0


def test_one_branch_may_fill_the_pool(make_decoder):
    dec = make_decoder(num_pages=10, page_size=4)
    [[out]] = dec.generate([[2, 3, 4]], sampling=td.Sampling(temperature=0, ignore_eos=True), max_new_tokens=38)
    assert len(out.token_ids) == 38, "nothing is computed after the last one"
    [[out]] = dec.generate([[2, 3, 4]], sampling=td.Sampling(temperature=0, ignore_eos=True), max_new_tokens=None)
    assert len(out.token_ids) == 38
    [[a], [b]] = dec.generate([[2, 3, 4], [5] * 39], sampling=td.Sampling(temperature=0), max_new_tokens=1)
    assert (len(a.token_ids), len(b.token_ids)) == (1, 1)


def test_what_can_never_fit_is_refused_at_once(make_decoder):
    dec = make_decoder(num_pages=10, page_size=4)

    async def search():
        with pytest.raises(ValueError, match=r"prompts\[1\]: 40 tokens and a new one do not fit the 40 tokens"):
            await dec.roots([[2], [3] * 40])
        with await dec.roots([[2, 3, 4]]) as frontier:
            with pytest.raises(ValueError, match="max_new_tokens: 3 tokens and 38 new ones do not fit"):
                await frontier.extend(max_new_tokens=38)
            with pytest.raises(ValueError, match="branch 0 would be longer than 40 tokens"):
                frontier.append([5] * 38)

    asyncio.run(search())
    assert dec.model.forwards == [[2]]


def test_out_of_branches_says_so(make_decoder):
    dec = make_decoder(FakeModel(), max_branches=4)

    async def search():
        frontier = await dec.roots([[2, 3], [3, 4], [4, 5]])
        with pytest.raises(OutOfBranches, match="6 rows needed, 1 of 4 free"):
            frontier.fork(2)
        last = frontier.select([0]).fork(1)
        with pytest.raises(OutOfBranches, match=r"2 needed, none free; frontiers, .* hold all 4"):
            await dec.generate_async("the", num_branches=2, max_new_tokens=4)
        last.release()
        assert len(await dec.generate_async("the", num_branches=2, max_new_tokens=4)) == 1
        frontier.release()

    asyncio.run(search())


def test_the_branch_that_came_last_goes_first(make_decoder):
    """Of branches at rest with pages of their own, the youngest loses them, and no more than is needed."""
    dec = make_decoder(num_pages=26, page_size=4)

    async def search():
        resting = [await dec.roots([[first] * 12]) for first in (2, 3, 4)]
        for one in resting:
            await one.extend(max_new_tokens=6, sampling=td.Sampling(temperature=0, ignore_eos=True))
        busy = await dec.roots([[5] * 20])
        await busy.extend(max_new_tokens=26, sampling=td.Sampling(seed=0, ignore_eos=True))
        cached = [int(dec.engine.table.num_cached[one.branches[0]]) for one in resting]
        return cached, dec.stats.num_preemptions

    cached, num_preemptions = asyncio.run(search())
    assert 0 < num_preemptions < 3
    assert [tokens > 0 for tokens in cached] == [True] * (3 - num_preemptions) + [False] * num_preemptions
