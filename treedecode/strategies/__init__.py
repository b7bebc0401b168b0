"""Strategies: ways to spend compute on a problem, a file each."""

from treedecode.search.strategy import Strategy
from treedecode.strategies.best_of_n import BestOfN
from treedecode.strategies.chain_of_thought import ChainOfThought
from treedecode.strategies.dvts import DVTS
from treedecode.strategies.dynamic_allocation import DynamicAllocation
from treedecode.strategies.ets import ETS
from treedecode.strategies.iterative_refinement import IterativeRefinement
from treedecode.strategies.mcts import MCTS
from treedecode.strategies.particle_filter import ParticleFilter
from treedecode.strategies.rebase import REBASE
from treedecode.strategies.self_consistency import SelfConsistency
from treedecode.strategies.step_beam_search import StepBeamSearch
from treedecode.strategies.tree_of_thoughts import TreeOfThoughts

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        ChainOfThought,
        DynamicAllocation,
        IterativeRefinement,
        SelfConsistency,
        BestOfN,
        TreeOfThoughts,
        StepBeamSearch,
        DVTS,
        REBASE,
        ETS,
        MCTS,
        ParticleFilter,
    )
}

__all__ = ["STRATEGIES", "Strategy", *sorted(strategy.__name__ for strategy in STRATEGIES.values())]
