"""Strategy: the base class of all strategies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from treedecode.search.search import Outcome, Search
from treedecode.verify.judges import Judge
from treedecode.verify.scorers import Likelihood, TextScorer
from treedecode.verify.value import Value

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
        needs_verifier: True if it scores branches.
    """

    name: ClassVar[str]
    needs_verifier: ClassVar[bool] = False

    @property
    def num_branches(self) -> int:
        """The most branches that one problem holds at once."""
        raise NotImplementedError

    def share(self, problems: Sequence[str], notes: Mapping[str, Mapping[str, Any]]) -> Any:
        """Makes the object that all problems of a run share as `Search.shared`; None = they share none.

        Args:
            problems: ids of all problems, in order.
            notes: `Search.notes` of those that an earlier process solved, by id; they are not solved again.
        """
        return None

    def extendable_samples(self, scorer: Any) -> int | None:
        """Returns `num_samples` where its first chains are those of a run with fewer, which a larger run adds to.

        Such a strategy takes the chains of `Search.earlier` in place of its first ones. None = another number of
        samples is another run.

        Args:
            scorer: the run's verifier; None = it has none.
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
        """Checks that the strategy can run with a decoder, a task and a verifier; called before the run begins.

        Args:
            scorer: the run's verifier; None = it has none.

        Raises:
            ValueError: one of them does not fit (named): a verifier may give negative scores where scores are added up.
        """
        if getattr(self, "answer", None) == "weighted" and may_be_negative(scorer):
            raise ValueError(
                f'answer: "weighted" adds scores up, which must not be negative then, and {scorer!r} does not say that '
                'its scores are probabilities; answer="best" takes any'
            )

    async def solve(self, search: Search) -> Outcome:
        """Solves one problem.

        Frontiers that it holds when it ends (by an error, a spent budget, a cancelled call) are released.
        """
        raise NotImplementedError


def scores_branches_alone(scorer: Any) -> bool:
    """Returns whether a branch's score is the same whatever other branches are scored; unknown scorers may compare."""
    return isinstance(scorer, (TextScorer, Judge, Likelihood, Value))


def may_be_negative(scorer: Any) -> bool:
    """Returns whether a scorer of this kind gives negative scores; for a user's function only the scores will tell."""
    return scorer is not None and not (scorer.probability or isinstance(scorer, (TextScorer, Judge)))


def choose(search: Search, solutions: Sequence[Outcome], answer: str) -> Outcome:
    """Chooses among scored solutions; of equals the one given first.

    Args:
        answer: "best": the best scored solution; "weighted": the answer with the highest sum of scores, equal answers
            being one (2206.02336); "majority": the answer of most solutions. Where no solution comes to an answer, all
            choose the best scored one.

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
    """Returns a key that orders scored outcomes: those with an answer above those without, then by score."""
    assert outcome.score is not None
    return outcome.answer is not None, outcome.score
