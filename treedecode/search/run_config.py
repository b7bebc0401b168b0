"""RunConfig: the arguments of `solve`, listed once."""

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from treedecode.accounting.budget import Budget
from treedecode.common.validation import integer
from treedecode.decoding.decoder import Decoder, Prompt
from treedecode.engine.sampling import Sampling
from treedecode.search.solutions import Solution
from treedecode.search.strategy import Strategy
from treedecode.tasks.base import Problem, Task
from treedecode.verify.scorers import scorer_of


@dataclass(frozen=True)
class RunConfig:
    """Says which strategy runs on which problems, and how; `solve` describes each field.

    Raises:
        TypeError: the strategy or the seed is something else.
        ValueError: the strategy needs a verifier and there is none, or its sampling has a seed.
    """

    decoder: Decoder
    problems: Iterable[Problem]
    _: KW_ONLY
    strategy: Strategy
    task: Task | None = None
    verifier: Any = None
    budget: Budget | None = None
    sampling: Sampling | None = None
    seed: int = 0
    prompt: Callable[[Problem], Prompt] | None = None
    grade: bool = True
    journal: str | None = None
    callback: Callable[[Solution], None] | None = None

    def __post_init__(self) -> None:
        strategy = self.strategy
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy: expected a treedecode.strategies.Strategy, got {strategy!r}")
        if type(strategy).num_branches is Strategy.num_branches:
            raise TypeError(f"strategy: {type(strategy).__name__} has no num_branches, the most branches that it holds")
        sampling = getattr(strategy, "sampling", None)
        if sampling is not None and sampling.seed is not None:
            raise ValueError(
                f"sampling: {strategy.name} has the seed {sampling.seed}; branches take theirs from the run's"
            )
        integer("seed", self.seed)
        if strategy.needs_verifier and self.verifier is None:
            raise ValueError(f"verifier: {strategy.name} scores branches and needs one")

    @property
    def num_samples(self) -> int | None:
        """The samples of each solution, where a solution of fewer can be added to; None = it cannot."""
        may_be_cut = self.budget is not None and self.budget != Budget()
        return None if may_be_cut else self.strategy.extendable_samples(scorer_of(self.verifier))
