"""solve: runs a strategy on many problems, all in the same forwards."""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from treedecode.search.run import Run
from treedecode.search.run_config import RunConfig
from treedecode.search.solutions import Result

P = ParamSpec("P")
T = TypeVar("T")


def _with_parameters_of(config: Callable[P, object]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Gives a function the parameters of `config`: to `help` at run time, and to editors and type checkers."""
    parameters = inspect.signature(config)

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        returned = inspect.signature(function).return_annotation
        function.__signature__ = parameters.replace(return_annotation=returned)  # type: ignore[attr-defined]
        return function

    return decorate


@_with_parameters_of(RunConfig)
def solve(*args: Any, **kwargs: Any) -> Result:
    """Runs a strategy on problems: as many side by side as the decoder has branches for, all in the same forwards.

    A problem's solution depends on the problem, the seed and the strategy alone: not on what runs beside it, nor on
    their order (where no budget of the whole run, no limit in seconds and no strategy that divides a budget among
    problems says otherwise).

    Args:
        decoder: decodes the branches of all problems.
        problems: from `Task.problems`, or the caller's own.
        strategy: for instance `TreeOfThoughts(depth=3, width=5)`.
        task: reads the texts; None = the task that all problems are of, as `Task.problems` gives them.
        verifier: scores branches: a scorer of `treedecode.verify`, or a function of (problem, text).
        budget: hard limits. A problem they cut short gets the best answer it had; one they kept from starting, none.
        sampling: how branches sample; its seed is not used.
        seed: of the run.
        prompt: gives what the model reads for a problem; None = the problem's own prompt, in which special tokens such
            as `<|im_end|>` are text.
        grade: whether the task checks the solutions, which the strategy never sees.
        journal: a file that solutions are written to as they come. A later call with the same arguments takes them from
            there and solves the rest, and its budget and ledger go on from what was spent.
        callback: called with every solution as it comes, those of the journal first.

    Raises:
        TypeError: an argument has the wrong type (named); nothing has been started or written then.
        ValueError: an argument is wrong (named); nothing has been started or written then.
        Exception: of a verifier or a strategy, with the problem's id in a note; the run ends, the journal stays.
    """
    config = _config("solve", args, kwargs)
    return config.decoder.run(_solve(config))


@_with_parameters_of(RunConfig)
async def solve_async(*args: Any, **kwargs: Any) -> Result:
    """Runs a strategy on problems: `solve` for coroutines, with the same arguments, results and errors."""
    return await _solve(_config("solve_async", args, kwargs))


def _config(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RunConfig:
    """Makes the configuration; errors about missing or unknown arguments name the function that was called."""
    try:
        return RunConfig(*args, **kwargs)
    except TypeError as error:
        own = f"{RunConfig.__init__.__qualname__}()"
        if not str(error).startswith(own):
            raise
        raise TypeError(name + "()" + str(error).removeprefix(own)) from None


async def _solve(config: RunConfig) -> Result:
    return await Run(config).solve()
