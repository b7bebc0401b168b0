"""Futures and coroutines across event loops and threads."""

import asyncio
import contextvars
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

# Event loops that stand still until this code returns, because code in them waits for it.
WAITING_LOOPS: ContextVar[tuple[asyncio.AbstractEventLoop, ...]] = ContextVar("WAITING_LOOPS", default=())


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs this code; None = it is no coroutine."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def settle(future: asyncio.Future, result: Any = None, error: BaseException | None = None) -> None:
    """Resolves a future of any event loop, from any thread; does nothing if it is done already."""

    def resolve() -> None:
        if future.done():
            return
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    loop = future.get_loop()
    if loop.is_closed():
        return
    if running_loop() is loop:
        resolve()
    else:
        loop.call_soon_threadsafe(resolve)


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end; inside a running event loop (Jupyter) in a thread, while that loop stands still."""
    loop = running_loop()
    if loop is None:
        return asyncio.run(work)
    context = contextvars.copy_context()
    context.run(WAITING_LOOPS.set, (*WAITING_LOOPS.get(), loop))
    # A thread of its own: this may be the thread of an outer run, whose coroutine calls code that is none.
    worker = ThreadPoolExecutor(1, thread_name_prefix="treedecode")
    try:
        return worker.submit(context.run, asyncio.run, work).result()
    finally:
        worker.shutdown(wait=False)
