"""The plan of the study: its table's rows, and the budgets of its curves."""

from collections.abc import Sequence

from treedecode.study.rows import Entry

CHAINS = 8  # of self-consistency and best-of-n in the table, and what the searches are sized like

PLAN = (
    Entry("chain", "Baseline: one chain", "chain_of_thought"),
    Entry(
        "chain_scaling",
        "Chain-of-thought scaling (8x)",
        "chain_of_thought",
        {"wait": "\n"},
        {"min_tokens": 8.0, "max_tokens": 8.0},
    ),
    Entry("refinement", "Iterative refinement (10 passes)", "iterative_refinement", {"max_passes": 10}),
    Entry(
        "tree_of_thoughts", "Tree of thoughts (depth 3, width 5)", "tree_of_thoughts", {"depth": 3, "width": 5, "keep": 5}
    ),
    Entry("self_consistency", f"Self-consistency ({CHAINS} chains)", "self_consistency", {"num_samples": CHAINS}),
    Entry("best_of_n", f"Best of {CHAINS}", "best_of_n", {"num_samples": CHAINS}),
    Entry("step_beam_search", "Beam search over steps (16)", "step_beam_search", {"num_beams": 16, "width": 4}),
    Entry("dvts", "DVTS (16)", "dvts", {"num_beams": 16, "width": 4}),
    Entry("rebase", "REBASE (16)", "rebase", {"width": 16}),
    Entry("ets", "ETS (16)", "ets", {"width": 16}),
    Entry("mcts", "MCTS (16 simulations)", "mcts", {"num_simulations": 16}),
    Entry("particle_filter", "Particle filter (16)", "particle_filter", {"num_particles": 16}),
    *(
        Entry(
            f"dynamic_allocation_{budget}x",
            f"Dynamic allocation ({budget}x)",
            "dynamic_allocation",
            {"mean_samples": budget},
            curve="dynamic_allocation",
        )
        for budget in (1, 2, 4, 8)
    ),
    Entry("chain_pool", "Self-consistency (32 chains)", "chain_pool", {"num_samples": 32}),
)


def choose(names: Sequence[str] | None) -> list[Entry]:
    """The baseline and the entries of strategies by key or by strategy's name; None = all.

    Raises:
        ValueError: a name is no entry's.
    """
    if names is None:
        return list(PLAN)
    known = {name for entry in PLAN for name in (entry.key, entry.strategy)}
    for name in names:
        if name not in known:
            raise ValueError(f"strategies: expected some of {', '.join(sorted(known))}, got {name!r}")
    return [entry for entry in PLAN if entry is PLAN[0] or {entry.key, entry.strategy} & set(names)]
