"""Particle filtering (2502.01618): sequential Monte Carlo over steps, weighted by a process reward model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.common.validation import int_in, number_in, one_of
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import ANSWERS, Strategy, choose, may_be_negative
from treedecode.strategies.rebase import softmax

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder
    from treedecode.tasks.base import Task

_EPS = 1e-6  # a score of 0 or 1 has an infinite logit


@dataclass(frozen=True)
class ParticleFilter(Strategy):
    """Particles go on step by step and are resampled with weights softmax(logit(score)).

    Complete solutions stay particles and are resampled with the others. Between two resamplings logits add up, each
    step's score being one more observation.

    Args:
        num_particles: N of the paper, which goes from 1 to 128.
        ess_threshold: resamples when the effective sample size 1 / sum(w^2) is at most this share of the particles; 1 =
            after every step (the paper), 0 = never.
        temperature: divides the logits in the softmax.
        is_logit: the verifier's scores are logits already, not probabilities.
        answer: chooses among the particles: "best": the best scored one (the paper); "weighted": the answer of
            the greatest weight, weights being those since the last resampling; "majority": that of most particles.
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "particle_filter"
    needs_verifier: ClassVar[bool] = True

    num_particles: int = 16
    ess_threshold: float = 1.0
    temperature: float = 1.0
    is_logit: bool = False
    answer: str = "best"
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        int_in("num_particles", self.num_particles, 1)
        number_in("ess_threshold", self.ess_threshold, 0, 1)
        number_in("temperature", self.temperature, 1e-6)
        one_of("answer", self.answer, ANSWERS)

    @property
    def num_branches(self) -> int:
        return self.num_particles

    def check(self, decoder: "Decoder", task: "Task", scorer: Any) -> None:
        if not self.is_logit and may_be_negative(scorer):
            raise ValueError(
                f"is_logit: False needs probabilities, and {scorer!r} does not say that its scores are; "
                "is_logit=True takes any numbers"
            )

    async def solve(self, search: Search) -> Outcome:
        assert search.sampling.seed is not None
        rng = np.random.default_rng(search.sampling.seed % 2**64)
        particles = (await search.root()).spread(self.num_particles)
        log_weights = np.zeros(self.num_particles)
        while (growing := search.unfinished(particles)).any():
            await search.step(particles, self.sampling)
            await search.score(particles, growing)
            log_weights += self._logits(particles.scores) / self.temperature
            weights = softmax(log_weights)
            goes_on = search.unfinished(particles).any()
            if goes_on and effective_sample_size(weights) <= self.ess_threshold * self.num_particles:
                particles = particles.spread(systematic_resampling(weights, rng.random()))
                log_weights = np.zeros(self.num_particles)
        solutions = search.outcomes(particles)
        if self.answer == "weighted":
            return search.vote(solutions, softmax(log_weights))
        return choose(search, solutions, self.answer)

    def _logits(self, scores: np.ndarray) -> np.ndarray:
        if self.is_logit:
            return scores
        if (scores < 0).any() or (scores > 1).any():
            raise ValueError(f"verifier: expected probabilities, as is_logit=False says, got {scores}")
        clipped = scores.clip(_EPS, 1 - _EPS)
        return np.log(clipped / (1 - clipped))


def effective_sample_size(weights: np.ndarray) -> float:
    """Returns 1 / sum(w^2) of normalised weights, from 1 to their number (Kong, Liu and Wong 1994)."""
    return float(1 / (weights**2).sum())


def systematic_resampling(weights: np.ndarray, u: float) -> IntArray:
    """Draws how many copies of each particle there are among `n`: `n * weights` on average, off by less than 1.

    Args:
        weights: `[n]`, normalised.
        u: uniform in [0, 1); the points are (u + i) / n.

    Returns:
        `[n]` int64 that sum to n.
    """
    n = len(weights)
    edges = np.cumsum(weights) * n
    edges[-1] = n  # a sum that falls short of 1 would lose a point
    points_below = np.ceil(edges - u).clip(0, n).astype(np.int64)
    return np.diff(points_below, prepend=0)
