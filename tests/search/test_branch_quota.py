"""Places: a semaphore whose takers want several at once."""

import asyncio

from treedecode.search.branch_quota import Places


async def settle():
    for _ in range(4):
        await asyncio.sleep(0)


def test_first_come_first_served():
    async def run():
        places, order = Places(4), []

        async def one(name, count):
            await places.take(count)
            order.append(name)

        await one("a", 3)
        tasks = [asyncio.ensure_future(one(name, count)) for name, count in (("b", 4), ("c", 1))]
        await settle()
        assert order == ["a"]  # one place is free, but the large taker came first
        places.give(3)
        await settle()
        assert order == ["a", "b"]
        places.give(4)
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c"]

    asyncio.run(run())


def test_takers_that_are_cancelled_take_nothing():
    async def run():
        places = Places(2)
        await places.take(2)
        gone, waits = (asyncio.ensure_future(places.take(2)) for _ in range(2))
        await settle()
        gone.cancel()
        places.give(2)  # before the cancelled one has run again
        await waits
        behind, small = asyncio.ensure_future(places.take(2)), asyncio.ensure_future(places.take(1))
        await settle()
        places.give(1)
        behind.cancel()
        await small  # fits once the large one before it is gone
        places.give(2)
        served = asyncio.ensure_future(places.take(2))
        await settle()
        assert served.done()
        late = asyncio.ensure_future(places.take(1))
        await settle()
        places.give(1)
        late.cancel()  # served and cancelled at once: the place is free again
        await settle()
        places.give(1)
        await asyncio.wait_for(places.take(2), 1)

    asyncio.run(run())
