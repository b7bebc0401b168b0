"""Strategies: ways to spend compute on a problem, one file each."""

from treedecode.strategies.base import Strategy
from treedecode.strategies.chain_of_thought import ChainOfThought
from treedecode.strategies.dynamic_allocation import DynamicAllocation
from treedecode.strategies.self_consistency import SelfConsistency
from treedecode.strategies.tree_of_thoughts import TreeOfThoughts

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        ChainOfThought,
        DynamicAllocation,
        SelfConsistency,
        TreeOfThoughts,
    )
}

__all__ = ["STRATEGIES", "Strategy", *sorted(strategy.__name__ for strategy in STRATEGIES.values())]
