"""Chains: sampled solutions as the gate sees them, after their branches have been released."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treedecode.decoding.frontier import Frontier
from treedecode.search.search import Outcome, Search

WINDOW = 8  # tokens whose mean log-probability is compared along a chain; about a step of arithmetic


@dataclass(frozen=True)
class Chain:
    """A sampled solution.

    Attributes:
        text: of the solution.
        answer: extracted from the text; None = the solution has none, or was cut.
        score: the verifier's; None without one.
        num_tokens: generated.
        logprob: mean log-probability of its tokens, nats.
        worst_logprob: the lowest mean over `WINDOW` tokens in a row (over all where there are fewer).
        node: its last step in the search tree.
    """

    text: str
    answer: str | None
    score: float | None
    num_tokens: int
    logprob: float
    worst_logprob: float
    node: int = -1

    @property
    def outcome(self) -> Outcome:
        """The chain as an answer to the problem."""
        return Outcome(self.answer, self.text, self.score, self.node)


async def chains_of(search: Search, frontier: Frontier) -> list[Chain]:
    """Reads the chains of a frontier that was sampled to the end, and scores them where the search has a verifier."""
    scores = await search.score(frontier) if search.has_scorer else None
    solutions = zip(frontier.logprobs(), search.texts(frontier), search.answers(frontier), strict=True)
    chains = []
    for i, (logprobs, text, answer) in enumerate(solutions):
        score = None if scores is None else float(scores[i])
        mean, worst = confidence(logprobs.astype(np.float64))
        chains.append(Chain(text, answer, score, len(logprobs), mean, worst, int(frontier.nodes[i])))
    return chains


def confidence(logprobs: np.ndarray) -> tuple[float, float]:
    """Returns the mean log-probability, and the lowest mean over `WINDOW` tokens in a row; zeros without tokens."""
    if len(logprobs) == 0:
        return 0.0, 0.0
    sums = np.concatenate([[0.0], np.cumsum(logprobs)])
    width = min(WINDOW, len(logprobs))
    return float(logprobs.mean()), float(((sums[width:] - sums[:-width]) / width).min())


def selected(chains: Sequence[Chain], classes: np.ndarray) -> int:
    """Returns the index of the chain whose answer is taken.

    With scores it is the best scored chain, without them the first of the largest class of equal answers; of equals the
    first. A chain without an answer is taken only where no other has one.

    Args:
        classes: `[n]`, equal for equal answers, -1 = no answer (`Search.classes`).
    """
    answered = classes >= 0
    if chains[0].score is not None:
        scores = np.array([chain.score for chain in chains], np.float64)
        return int(np.lexsort((np.arange(len(chains)), -scores, ~answered))[0])
    if not answered.any():
        return 0
    return int(np.flatnonzero(classes == np.bincount(classes[answered]).argmax())[0])
