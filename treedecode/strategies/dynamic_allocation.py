"""Dynamic allocation (2410.04707): spends compute where a learned gate expects it to help."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from treedecode.allocation.allocate import Bid
from treedecode.allocation.allocators import BidHistory, OfflineAllocator, OnlineAllocator, Policy
from treedecode.allocation.chain_costs import UNITS, chain_costs, kv_sizes
from treedecode.allocation.chains import Chain, chains_of, selected
from treedecode.allocation.features import PromptFeatures, feature_vector, prompt_features
from treedecode.allocation.gate import Gate
from treedecode.common.validation import int_in, number_in, one_of
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import CostSamples, Strategy, rank
from treedecode.strategies.tree_of_thoughts import TreeOfThoughts


@dataclass(frozen=True)
class DynamicAllocation(Strategy):
    """Samples a few chains for every problem, then more chains, or a tree search, where a unit of the budget buys most.

    After every wave of chains the gate judges anew. The answer is that of the best scored chain, or else of most.

    Args:
        budget: mean cost of a problem, in units of what one chain alone costs; probes are part of it.
        gate: a trained gate or its file, for the verifier, the task and the model that it was trained with.
        probes, wave: chains of every problem before the gate's first judgement, and between two judgements.
        max_chains: limits the chains of one problem; None = a wave more than the gate has seen in training.
        floor: chains that every problem gets, whatever the gate's judgement; 0 = the probes alone.
        mode: "offline" divides the budget among all problems of the run after each wave; "online" takes them as a
            stream, at a price that follows what earlier ones spent.
        unit: of cost: "tokens" generated, or "kv_bytes" read.
        price: "online": after the opening bids, in expected right answers per chain; None = the gate's for the budget.
        step, lag: "online": how fast the price moves, and how many problems later costs count (`OnlineAllocator`).
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "dynamic_allocation"

    budget: float
    gate: Gate | str | os.PathLike[str]
    probes: int = 1
    wave: int = 1
    max_chains: int | None = None
    floor: int = 0
    mode: str = "offline"
    unit: str = "tokens"
    price: float | None = None
    step: float = 0.05
    lag: int = 32
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gate, Gate):
            object.__setattr__(self, "gate", Gate.load(self.gate))
        config = self._gate.config
        int_in("wave", self.wave, 1)
        int_in("lag", self.lag, 1)
        int_in("probes", self.probes, config.min_chains, config.max_chains)
        if self.max_chains is not None:
            int_in("max_chains", self.max_chains, self.probes, config.max_chains + self.wave)
        int_in("floor", self.floor, 0, self._chain_limit)
        number_in("budget", self.budget, max(self.probes, self.floor))
        number_in("price", 1 if self.price is None else self.price, 1e-4, 1)
        number_in("step", self.step, 0)
        one_of("mode", self.mode, ("offline", "online"))
        one_of("unit", self.unit, tuple(UNITS))

    @property
    def num_branches(self) -> int:
        return max(self.probes, self.wave, *(search.num_branches for search in self._searches))

    @property
    def _gate(self) -> Gate:
        return cast(Gate, self.gate)

    @property
    def _chain_limit(self) -> int:
        """The most chains that one problem may get."""
        return self._gate.config.max_chains + self.wave if self.max_chains is None else self.max_chains

    @property
    def _searches(self) -> list[TreeOfThoughts]:
        """The tree searches of the gate's menu."""
        return [TreeOfThoughts(*item.shape, sampling=self.sampling) for item in self._gate.config.menu]

    def share(self, problems: Sequence[str], notes: Mapping[str, Mapping[str, Any]]) -> Any:
        policy, histories = Policy(self.budget, self._chain_limit, self.wave, self.floor), BidHistory.by_problem(notes)
        if self.mode == "offline":
            return OfflineAllocator(policy, problems, histories)
        price = self.price or self._gate.price(self.budget)
        return OnlineAllocator(policy, problems, histories, price=price, step=self.step, lag=self.lag)

    def cost(self, samples: CostSamples) -> np.ndarray:
        if samples.unit != self.unit:
            raise ValueError(f"unit: dynamic allocation divides {self.unit}, and what it costs in them alone is known")
        return self.budget * samples.one_chain(self.probes)

    def check(self, *run: Any) -> None:
        self._gate.check(*run)

    async def solve(self, search: Search) -> Outcome:
        try:
            return await self._solve(search)
        finally:
            search.notes["spent"] = self._spent(search)
            search.shared.leave(search.problem.id, search.notes["spent"])

    async def _solve(self, search: Search) -> Outcome:
        with await search.root() as root:
            [prompt] = await prompt_features(root, wants_hidden=self._gate.config.hidden_size > 0)
            with root.spread(self.probes) as probes:
                await search.complete(probes, self.sampling)
                chains = await chains_of(search, probes)
        while True:
            classes = search.classes([chain.answer for chain in chains])
            best = chains[selected(chains, classes)].outcome
            if len(chains) >= self._chain_limit:
                return best
            bid = self._bid(search, prompt, chains, classes)
            search.notes.setdefault("bids", []).append(bid.to_json())
            grant = await search.shared.decide(search, bid)
            if grant.ends:
                return best
            if grant.tree >= 0:
                return max(best, await self._searches[grant.tree].solve(search), key=rank)  # of equals the chain's
            with (await search.root()).spread(grant.num_chains) as more:
                await search.complete(more, self.sampling)
                chains += await chains_of(search, more)

    def _bid(self, search: Search, prompt: PromptFeatures, chains: list[Chain], classes: np.ndarray) -> Bid:
        sizes = kv_sizes(search.decoder)
        beliefs = self._gate.believe(feature_vector(prompt, chains, classes)[None])
        single, further = chain_costs(self.unit, prompt.num_tokens, chains, wave=self.wave, **sizes)
        return Bid(
            **beliefs.of_problem(0),
            chain_cost=further,
            single_chain_cost=single,
            tree_costs=tuple(getattr(item, self.unit) * single for item in self._gate.config.menu),
            spent=self._spent(search),
            num_chains=len(chains),
        )

    def _spent(self, search: Search) -> float:
        return float(getattr(search.spending, UNITS[self.unit]))
