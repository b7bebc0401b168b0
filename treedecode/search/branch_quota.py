"""Places: how many branches all problems of a run may hold together."""

import asyncio
from collections import deque


class Places:
    """A counting semaphore whose takers want several at once; first come, first served, so nobody starves."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> None:
        """Waits until `count` places are free, and takes them."""
        if not self._waiting and count <= self._free:
            self._free -= count
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((count, future))
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # it had got them already
                self.give(count)
            else:
                self.give(0)  # who stood behind it may fit
            raise

    def give(self, count: int) -> None:
        """Gives `count` places back."""
        self._free += count
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self._free):
            wanted, future = self._waiting.popleft()
            if not future.cancelled():
                self._free -= wanted
                future.set_result(None)
