"""The plan of the study: the rows of its table, and the budgets of its curves."""

from collections.abc import Sequence
from typing import Any

from treedecode.study.rows import ANSWER_TOKENS, Entry

NUM_CHAINS = 8  # of self-consistency and best-of-n in the table
POOL_SIZE = 32  # chains for the curves of self-consistency, best-of-n and coverage
MAX_PASSES = 10  # of iterative refinement

BUDGETS = (2, 4, 8)  # of dynamic allocation, in chains per problem; one chain is the baseline


def default_plan(gate: str, *, follows_instructions: bool) -> list[Entry]:
    """Returns the baseline and an entry for every strategy.

    Args:
        gate: file of the gate of dynamic allocation.
        follows_instructions: the model can be asked for a critique; else scores of the verifier choose what to revise.
    """
    # solutions repeat their answers, and a later pass may still find another (docs/strategies.md)
    refined: dict[str, Any] = {"max_passes": MAX_PASSES, "max_repeats": MAX_PASSES - 1, "good": 0.99}
    if not follows_instructions:
        refined |= {"critique_prompt": "", "doubt": 0.3}
    forced = {} if follows_instructions else {"wait": "\n", "answer_prompt": "\n"}  # words of the demo model
    chains, pool = {"num_samples": NUM_CHAINS}, {"num_samples": POOL_SIZE}
    searches = (
        ("step_beam_search", "Beam search over steps (16)", {"num_beams": 16, "width": 4}),
        ("dvts", "DVTS (16)", {"num_beams": 16, "width": 4}),
        ("rebase", "REBASE (16)", {"width": 16}),
        ("ets", "ETS without diversity (16)", {"width": 16}),
        ("mcts", "MCTS (16 simulations)", {"num_simulations": 16}),
        ("particle_filter", "Particle filter (16)", {"num_particles": 16}),
    )
    return [
        Entry("chain", "Baseline: one chain", "chain_of_thought"),
        Entry(
            "chain_scaling",
            "Chain-of-thought scaling (8x)",
            "chain_of_thought",
            {"max_waits": 64, "answer_tokens": ANSWER_TOKENS, **forced},
            {"min_tokens": 8.0, "max_tokens": 8.0},
        ),
        Entry("refinement", f"Iterative refinement (up to {MAX_PASSES} passes)", "iterative_refinement", refined),
        Entry(
            "tree_of_thoughts",
            "Tree of thoughts (depth 3, width 5)",
            "tree_of_thoughts",
            {"depth": 3, "width": 5, "keep": 5},
        ),
        Entry("self_consistency", f"Self-consistency ({NUM_CHAINS} chains)", "self_consistency", chains),
        Entry("best_of_n", f"Best of {NUM_CHAINS}", "best_of_n", chains),
        *(Entry(name, label, name, settings) for name, label, settings in searches),
        *(
            Entry(
                f"dynamic_allocation_{budget}x",
                f"Dynamic allocation (budget {budget})",
                "dynamic_allocation",
                {"budget": budget, "gate": gate},
                curve="dynamic_allocation",
            )
            for budget in BUDGETS
        ),
        # the pool costs more: it has scores, which votes do not use
        Entry(f"self_consistency_{POOL_SIZE}", f"Self-consistency ({POOL_SIZE} chains)", "self_consistency", pool),
        Entry("chain_pool", f"Pool of {POOL_SIZE} chains, all scored, for the curves", "chain_pool", pool),
    ]


def choose(plan: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """Returns the baseline, which is first, and the entries with one of these keys or strategies.

    Raises:
        ValueError: a name is no entry's.
    """
    choices = {name for entry in plan for name in (entry.key, entry.strategy)}
    for name in names:
        if name not in choices:
            raise ValueError(f"strategies: expected some of {', '.join(sorted(choices))}, got {name!r}")
    return [entry for entry in plan if entry is plan[0] or {entry.key, entry.strategy} & set(names)]
