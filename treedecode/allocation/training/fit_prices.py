"""Fits the prices of budgets, at which an online allocation begins before it has seen any cost."""

from collections.abc import Sequence

import numpy as np

from treedecode.allocation.allocate import Bid
from treedecode.allocation.allocators import MIN_PRICE, Policy
from treedecode.allocation.gate import Gate
from treedecode.allocation.training.rollouts import Rollouts
from treedecode.allocation.training.simulate import Bidder, Replay, random_orders

PRICES = np.geomspace(1, MIN_PRICE, 33)


def fit_prices(gate: Gate, data: Rollouts, *, repeats: int = 4, seed: int = 0) -> tuple[tuple[float, float], ...]:
    """Measures the mean cost of problems at several prices.

    Each price is replayed on the rollouts, the same for all problems, with the fewest chains that the gate knows as
    probes, waves of one chain, no floor, and the default limit of chains of `DynamicAllocation`.

    Args:
        data: problems that the gate was not fitted to.
        repeats: random orders of the chains.

    Returns:
        pairs (mean cost of a problem in units of the cost of a single chain, price), costs rising.
    """
    config = gate.config
    data = data if config.hidden_size else data.without_hidden()
    rng = np.random.default_rng(seed)
    policy = Policy(budget=1, max_chains=min(config.max_chains + 1, data.num_chains), wave=1, floor=0)
    multiples = np.zeros((repeats, len(PRICES)))
    for repeat in range(repeats):
        replay = Replay(data, random_orders(data, rng))
        bidder = _cached(replay.gate_bidder(gate, policy.wave))
        multiples[repeat] = [replay.at_price(bidder, policy, price, config.min_chains).multiple for price in PRICES]
    costs = multiples.mean(axis=0)
    rises = np.r_[True, costs[1:] > np.maximum.accumulate(costs)[:-1]]
    return tuple(zip(costs[rises].tolist(), PRICES[rises].tolist(), strict=True))


def _cached(bidder: Bidder) -> Bidder:
    """Wraps a bidder so that it makes each bid once: a bid does not depend on the price."""
    cache: dict[tuple[int, int], Bid] = {}

    def cached(problems: Sequence[int], chains: np.ndarray) -> list[Bid]:
        missing = [i for i in problems if (i, int(chains[i])) not in cache]
        if missing:
            bids = bidder(missing, chains)
            cache.update(((i, int(chains[i])), bid) for i, bid in zip(missing, bids, strict=True))
        return [cache[i, int(chains[i])] for i in problems]

    return cached
