"""Which price meets which budget: where a stream begins, before it has seen anything be spent."""

from collections.abc import Callable, Sequence

import numpy as np

from treedecode.allocation.allocate import Bid
from treedecode.allocation.allocators import MIN_PRICE, Terms
from treedecode.allocation.gate import Gate
from treedecode.allocation.training.rollouts import Rollouts
from treedecode.allocation.training.simulate import Replay, orders

PRICES = np.geomspace(1, MIN_PRICE, 33)


def fit_prices(gate: Gate, data: Rollouts, *, repeats: int = 4, seed: int = 0) -> tuple[tuple[float, float], ...]:
    """Pairs (mean cost of a problem in units of one chain alone, price at which it comes to that), costs rising.

    Each price is replayed on the rollouts for all problems alike, with the fewest chains that the gate knows as probes,
    waves of one chain, no floor, and as many chains at most as `DynamicAllocation` takes by default.

    Args:
        data: problems that the gate was not fitted to.
        repeats: random orders of the chains.
    """
    config = gate.config
    data = data if config.hidden_size else data.without_hidden()
    rng = np.random.default_rng(seed)
    terms = Terms(budget=1, max_chains=min(config.max_chains + 1, data.num_chains), wave=1, floor=0)
    spent = np.zeros((repeats, len(PRICES)))
    for repeat in range(repeats):
        replay = Replay(data, orders(data, rng))
        bids = _remembered(replay.by_gate(gate, terms.wave))
        spent[repeat] = [replay.at_price(bids, terms, price, config.min_chains).multiple for price in PRICES]
    costs = spent.mean(axis=0)
    rises = np.r_[True, costs[1:] > np.maximum.accumulate(costs)[:-1]]
    return tuple(zip(costs[rises].tolist(), PRICES[rises].tolist(), strict=True))


def _remembered(
    bids: Callable[[Sequence[int], np.ndarray], list[Bid]],
) -> Callable[[Sequence[int], np.ndarray], list[Bid]]:
    """The same, each asked for once: what a gate believes of so many chains does not depend on the price."""
    known: dict[tuple[int, int], Bid] = {}

    def again(problems: Sequence[int], chains: np.ndarray) -> list[Bid]:
        new = [i for i in problems if (i, int(chains[i])) not in known]
        if new:
            known.update(((i, int(chains[i])), bid) for i, bid in zip(new, bids(new, chains), strict=True))
        return [known[i, int(chains[i])] for i in problems]

    return again
