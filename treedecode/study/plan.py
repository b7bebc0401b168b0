"""The plan of the study: its table's rows, and the budgets of its curves."""

from collections.abc import Sequence
from typing import Any

from treedecode.study.rows import ANSWER_TOKENS, Entry

CHAINS = 8  # of self-consistency and best-of-n in the table
POOL = 32  # chains that curves of self-consistency, best-of-n and coverage are from
PASSES = 10  # of iterative refinement, at most

BUDGETS = (2, 4, 8)  # of dynamic allocation, in chains per problem; one chain is the baseline


def default_plan(gate: str, *, follows_instructions: bool) -> list[Entry]:
    """The baseline and every strategy.

    Args:
        gate: file of the gate that dynamic allocation goes by.
        follows_instructions: whether the model can be asked for a critique; else the verifier says what to revise.
    """
    # docs/strategies.md; solutions come to the same answer again and again, and a pass may still find another
    refined: dict[str, Any] = {"max_passes": PASSES, "max_repeats": PASSES - 1, "good": 0.99}
    if not follows_instructions:
        refined |= {"critique_prompt": "", "doubt": 0.3}
    forced = {} if follows_instructions else {"wait": "\n", "answer_prompt": "\n"}  # words that it has
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
        Entry("refinement", f"Iterative refinement (up to {PASSES} passes)", "iterative_refinement", refined),
        Entry(
            "tree_of_thoughts",
            "Tree of thoughts (depth 3, width 5)",
            "tree_of_thoughts",
            {"depth": 3, "width": 5, "keep": 5},
        ),
        Entry("self_consistency", f"Self-consistency ({CHAINS} chains)", "self_consistency", {"num_samples": CHAINS}),
        Entry("best_of_n", f"Best of {CHAINS}", "best_of_n", {"num_samples": CHAINS}),
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
        # beside the pool, which pays for scores that votes have no use for
        Entry(
            f"self_consistency_{POOL}", f"Self-consistency ({POOL} chains)", "self_consistency", {"num_samples": POOL}
        ),
        Entry("chain_pool", f"Pool of {POOL} chains, all scored, for the curves", "chain_pool", {"num_samples": POOL}),
    ]


def choose(plan: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The baseline, which is first, and the entries with one of these keys or strategies.

    Raises:
        ValueError: a name is no entry's.
    """
    known = {name for entry in plan for name in (entry.key, entry.strategy)}
    for name in names:
        if name not in known:
            raise ValueError(f"strategies: expected some of {', '.join(sorted(known))}, got {name!r}")
    return [entry for entry in plan if entry is plan[0] or {entry.key, entry.strategy} & set(names)]
