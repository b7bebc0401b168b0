"""What a strategy is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from treedecode.search.search import Outcome, Search
from treedecode.verify.judges import Judge
from treedecode.verify.scorers import TextScorer

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder
    from treedecode.tasks.base import Task

ANSWERS = ("best", "weighted", "majority")


class CostSamples(Protocol):
    """Samples of how one problem may go, from which a strategy tells what it will spend on it.

    Attributes:
        unit: what costs are counted in: "tokens" generated, or "kv_bytes" read.
    """

    unit: str

    def chains(self, count: int) -> np.ndarray:
        """`[num_samples]` costs of `count` chains side by side, which read the prompt's pages together."""
        ...

    def one_chain(self, count: int) -> np.ndarray:
        """`[num_samples]` costs of one chain that runs alone, the mean of `count` chains."""
        ...

    def tree(self, depth: int, width: int, keep: int) -> np.ndarray:
        """`[num_samples]` costs of a tree search.

        Raises:
            ValueError: nothing is known of a search of that shape.
        """
        ...


@dataclass(frozen=True)
class Strategy:
    """A way to spend compute on a problem: settings, and a coroutine that runs once per problem, many side by side.

    Subclasses are frozen dataclasses whose fields are the settings.

    Attributes:
        name: as on the command line.
        needs_verifier: whether it scores branches, and so needs a verifier.
    """

    name: ClassVar[str]
    needs_verifier: ClassVar[bool] = False

    @property
    def num_branches(self) -> int:
        """The most branches that one problem holds at once."""
        raise NotImplementedError

    def share(self, problems: Sequence[str], notes: Mapping[str, Mapping[str, Any]]) -> Any:
        """What the problems of a run have in common, made once for it: `Search.shared`. None = nothing.

        Args:
            problems: ids of all problems, in order.
            notes: `Search.notes` of those that an earlier process solved, by id; they are not solved again.
        """
        return None

    def cost(self, samples: CostSamples) -> np.ndarray:
        """Tells what the strategy may spend on a problem, for `treedecode.forecast`.

        Returns:
            `[num_samples]` costs in the unit of the samples.

        Raises:
            ValueError: the cost does not follow from the lengths of chains.
        """
        raise ValueError(
            f"strategy: what {self.name} with these settings costs does not follow from how long chains are, which is "
            "all that a gate knows"
        )

    def check(self, decoder: "Decoder", task: "Task", scorer: Any) -> None:
        """Looks at what a run has, before it begins.

        Args:
            scorer: the run's verifier; None = it has none.

        Raises:
            ValueError: the strategy cannot run with it (named): scores that it adds up may be negative, say.
        """
        if getattr(self, "answer", None) == "weighted" and may_be_negative(scorer):
            raise ValueError(
                f'answer: "weighted" adds scores up, which must not be negative then, and {scorer!r} does not say that '
                'its scores are probabilities; answer="best" takes any'
            )

    async def solve(self, search: Search) -> Outcome:
        """The strategy's answer to one problem.

        What it still holds when it ends, or is ended (by an error, a spent budget, a cancelled call), is released.
        """
        raise NotImplementedError


def may_be_negative(scorer: Any) -> bool:
    """Whether a scorer, by its kind, gives any numbers; of a user's function only its scores will tell."""
    return scorer is not None and not (scorer.probability or isinstance(scorer, (TextScorer, Judge)))


def require(name: str, value: Any, kind: type, low: float, high: float = float("inf")) -> None:
    """Checks a setting.

    Raises:
        TypeError: not a number of the kind. ValueError: outside of [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and isinstance(value, float)):
        raise TypeError(f"{name}: expected {'a number' if kind is float else 'an int'}, got {value!r}")
    if not low <= value <= high:
        bounds = f" >= {low:g}" if high == float("inf") else f" from {low:g} to {high:g}"
        raise ValueError(f"{name}: expected a number{'' if low == -float('inf') else bounds}, got {value}")


def require_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Checks a setting that is one of several words.

    Raises:
        ValueError: it is none of them.
    """
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def choose(search: Search, solutions: Sequence[Outcome], answer: str) -> Outcome:
    """The outcome of scored solutions; of equals the one given first.

    Args:
        answer: "best": the best scored solution; "weighted": the answer with the highest sum of scores, equal answers
            being one (2206.02336); "majority": that of most solutions. Where no solution comes to an answer, the best
            scored one.

    Raises:
        ValueError: scores that are to be summed are negative; a sum of log-probabilities would favour rare answers.
    """
    if answer == "best":
        return max(solutions, key=rank)
    if answer == "majority":
        return search.vote(solutions, np.ones(len(solutions)))
    scores = np.array([solution.score for solution in solutions], np.float64)
    if (scores < 0).any():
        raise ValueError(
            f'verifier: weighted votes need scores >= 0, got {scores.min():g}; answer="best" takes any scores'
        )
    return search.vote(solutions, scores)


def rank(outcome: Outcome) -> tuple[bool, float]:
    """Orders scored outcomes: those that come to an answer above those that do not, then by score."""
    assert outcome.score is not None
    return outcome.answer is not None, outcome.score
