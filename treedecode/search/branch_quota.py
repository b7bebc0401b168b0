"""Limits how many branches the problems of a run hold together."""

import asyncio
from collections import deque


class BranchQuota:
    """A counting semaphore whose users acquire several branches at once.

    It serves them in the order of their requests, so that a large request does not starve behind small ones.
    """

    def __init__(self, num_branches: int) -> None:
        self._num_free = num_branches
        self._requests: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, count: int) -> None:
        """Waits until `count` branches are free, and takes them."""
        if not self._requests and count <= self._num_free:
            self._num_free -= count
            return
        granted = asyncio.get_running_loop().create_future()
        self._requests.append((count, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if not granted.cancelled():  # the branches came before the cancellation
                self.release(count)
            else:
                self.release(0)  # the next request may fit without this one
            raise

    def release(self, count: int) -> None:
        """Gives `count` branches back, and serves the requests that fit now."""
        self._num_free += count
        while self._requests and (self._requests[0][1].cancelled() or self._requests[0][0] <= self._num_free):
            num_requested, granted = self._requests.popleft()
            if not granted.cancelled():
                self._num_free -= num_requested
                granted.set_result(None)
