"""BranchQuota serves requests for several branches in their order, and cancelled ones take nothing."""

import asyncio

from treedecode.search.branch_quota import BranchQuota


async def settle():
    for _ in range(4):
        await asyncio.sleep(0)


def test_first_come_first_served():
    async def run():
        quota, order = BranchQuota(4), []

        async def one(name, count):
            await quota.acquire(count)
            order.append(name)

        await one("a", 3)
        tasks = [asyncio.ensure_future(one(name, count)) for name, count in (("b", 4), ("c", 1))]
        await settle()
        assert order == ["a"]  # one branch is free, but the large request came first
        quota.release(3)
        await settle()
        assert order == ["a", "b"]
        quota.release(4)
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c"]

    asyncio.run(run())


def test_requests_that_are_cancelled_take_nothing():
    async def run():
        quota = BranchQuota(2)
        await quota.acquire(2)
        gone, waits = (asyncio.ensure_future(quota.acquire(2)) for _ in range(2))
        await settle()
        gone.cancel()
        quota.release(2)  # before the cancelled one has run again
        await waits
        behind, small = asyncio.ensure_future(quota.acquire(2)), asyncio.ensure_future(quota.acquire(1))
        await settle()
        quota.release(1)
        behind.cancel()
        await small  # fits once the large one before it is gone
        quota.release(2)
        served = asyncio.ensure_future(quota.acquire(2))
        await settle()
        assert served.done()
        late = asyncio.ensure_future(quota.acquire(1))
        await settle()
        quota.release(1)
        late.cancel()  # served and cancelled at once: the branch is free again
        await settle()
        quota.release(1)
        await asyncio.wait_for(quota.acquire(2), 1)

    asyncio.run(run())
