"""Calls that want more branches than are free: they wait for other calls, never for themselves."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

import treedecode as td
from treedecode.cache.page_pool import OutOfBranches

SETTINGS = {"num_branches": 6, "sampling": td.Sampling(seed=3), "max_new_tokens": 12}
PROMPTS = ["the", "a b", "nd"]


@pytest.mark.parametrize("max_branches", [1, 4, 8])
def test_calls_wait_for_each_other(make_decoder, max_branches):
    expected = [make_decoder().generate(prompt, **SETTINGS) for prompt in PROMPTS]

    async def coroutines(dec):
        return await asyncio.gather(*(dec.generate_async(prompt, **SETTINGS) for prompt in PROMPTS))

    def threads(dec):
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(lambda prompt: dec.generate(prompt, **SETTINGS), PROMPTS))

    assert asyncio.run(coroutines(make_decoder(max_branches=max_branches))) == expected
    assert threads(make_decoder(max_branches=max_branches)) == expected


def test_a_frontier_leaves_the_others_to_generate(make_decoder):
    expected = make_decoder().generate("the", **SETTINGS)
    dec = make_decoder(max_branches=6)

    async def run():
        with await dec.roots("a b"):
            return await dec.generate_async("the", **SETTINGS)

    assert asyncio.run(run()) == expected


def test_who_waits_hears_of_branches_that_became_a_frontiers(make_decoder):
    dec = make_decoder(max_branches=2)

    async def run():
        roots, outs = await asyncio.gather(
            dec.roots(["the", "a b"]), dec.generate_async("nd", **SETTINGS), return_exceptions=True
        )
        assert isinstance(outs, OutOfBranches)
        roots.release()

    asyncio.run(run())


def test_a_call_that_another_waits_for_does_not_wait_for_it(make_decoder):
    dec = make_decoder(max_branches=6)

    async def run():
        other = asyncio.create_task(dec.generate_async("the", **SETTINGS))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(OutOfBranches, match="calls that wait for this one"):
            dec.generate("a b", **SETTINGS)
        assert await other

    asyncio.run(run())


def test_closing_ends_the_waiting(make_decoder):
    dec = make_decoder(max_branches=6)

    async def run():
        calls = [asyncio.create_task(dec.generate_async(prompt, **SETTINGS)) for prompt in PROMPTS]
        await asyncio.sleep(0)
        dec.close()
        assert all(isinstance(out, RuntimeError) for out in await asyncio.gather(*calls, return_exceptions=True))

    asyncio.run(run())


def test_waiting_calls_can_be_cancelled(make_decoder):
    dec = make_decoder(max_branches=6)

    async def run():
        calls = [asyncio.create_task(dec.generate_async(prompt, **SETTINGS)) for prompt in PROMPTS]
        for ticks, call in enumerate(calls):
            for _ in range(ticks):
                await asyncio.sleep(0)
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert dec.num_branches == 0

    asyncio.run(run())
