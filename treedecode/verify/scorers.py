"""Scorers: give every live branch of a search a number."""

import asyncio
import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from treedecode.accounting.budget import require_time_left
from treedecode.common.validation import integer

if TYPE_CHECKING:
    from treedecode.decoding.frontier import Frontier
    from treedecode.tasks.base import Problem

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of a function; another one in every process

TextValue = Callable[["Problem", str], float | Awaitable[float]]


@runtime_checkable
class Scorer(Protocol):
    """Scores the branches of a frontier.

    Attributes:
        probability: True if scores are probabilities, in [0, 1]. Functions of texts have no such attribute.
    """

    @property
    def probability(self) -> bool:
        """True if scores are probabilities, in [0, 1]."""
        ...

    async def __call__(self, frontier: "Frontier", problem: "Problem") -> np.ndarray:
        """Sets and returns `frontier.scores`, `[n]` float64; higher is better."""
        ...


@dataclass(frozen=True)
class TextScorer:
    """Scores each branch by a function of its text.

    Args:
        fn: `fn(problem, text) -> float`, or a coroutine function; text is what follows the prompt. Coroutines of one
            call run side by side.
        probability: True if `fn` returns probabilities; they are checked.
        workers: threads that call `fn` for the texts of one call; 0 calls it in the event loop, and all decoding waits
            for it.

    Raises:
        TypeError: an argument has the wrong type (named); or, when called, `fn` returned no number.
        ValueError: `workers` is negative; or, when called, `fn` returned nan, or no probability.
    """

    fn: TextValue
    probability: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn: expected a callable (problem, text), got {self.fn!r}")
        if integer("workers", self.workers) < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")

    async def __call__(self, frontier: "Frontier", problem: "Problem") -> np.ndarray:
        """Scores the branches: `[n]` float64."""
        return await frontier.score(functools.partial(self._values, problem))

    async def _values(self, problem: "Problem", texts: list[str]) -> np.ndarray:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="treedecode-score") if self.workers else None
        loop = asyncio.get_running_loop()

        async def value(text: str) -> float:
            result: Any
            if pool is None:
                require_time_left()
                result = self.fn(problem, text)
            else:
                result = await loop.run_in_executor(pool, self.fn, problem, text)
            if inspect.isawaitable(result):
                result = await result
            try:
                return float(result)
            except (TypeError, ValueError):
                raise TypeError(f"fn: expected a number for each text, got {result!r}") from None

        try:
            values = np.array(await _together(value(text) for text in texts), np.float64)
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
        wrong = np.isnan(values) | (self.probability & ((values < 0) | (values > 1)))
        if wrong.any():
            expected = "a probability" if self.probability else "a number"
            raise ValueError(f"fn: expected {expected} for each text, got {values[wrong][0]}")
        return values


async def _together(work: Iterable[Coroutine[Any, Any, float]]) -> list[float]:
    """Runs coroutines side by side; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Likelihood:
    """Scores a branch by the log-probability of what it has generated, in nats, under the model's own distribution.

    Args:
        normalize: divides by the tokens behind the prompt, so that length is no handicap; forced text counts as 0.
    """

    normalize: bool = True
    probability = False

    async def __call__(self, frontier: "Frontier", problem: "Problem") -> np.ndarray:
        """Scores the branches: `[n]` float64, at most 0; 0 for a branch that is its prompt."""
        scores = frontier.cum_logprobs.copy()
        if self.normalize:
            scores /= np.maximum(frontier.num_tokens - frontier.num_prompt_tokens, 1)
        frontier.scores = scores
        return scores


def as_scorer(scorer: "Scorer | TextValue | None") -> Scorer:
    """Returns a scorer as it is, a `TextScorer` of a function (problem, text), or `Likelihood()` for None.

    Raises:
        TypeError: `scorer` is none of these.
    """
    if scorer is None:
        return Likelihood()
    if isinstance(scorer, Scorer) and callable(scorer) and not isinstance(scorer, type):
        return scorer
    expected = "expected None, a function (problem, text) or a Scorer"
    if not callable(scorer) or isinstance(scorer, type):
        raise TypeError(f"scorer: {expected}, got {scorer!r}")
    try:
        inspect.signature(scorer).bind(None, "")
    except ValueError:  # a builtin that does not tell its signature
        pass
    except TypeError as error:
        raise TypeError(f"scorer: {expected}, got {scorer!r}: {error}") from None
    return TextScorer(scorer)


def scorer_of(verifier: Any) -> Scorer | None:
    """Returns the scorer of a run's verifier; None where the run has none.

    Raises:
        TypeError: `verifier` is neither a scorer nor a function (problem, text).
    """
    return None if verifier is None else as_scorer(verifier)


def scorer_name(scorer: Scorer | None) -> str:
    """Returns the name that a scorer has in every process: its repr without addresses; "" for None."""
    return "" if scorer is None else _ADDRESS.sub("", repr(scorer))
