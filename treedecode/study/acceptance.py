"""Acceptance criteria of a study on the shipped model: judges statements by the study's numbers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from treedecode.common.intervals import Difference, paired_difference
from treedecode.study.analysis import accuracy_at, pool_sizes
from treedecode.study.laws import Curve

HOLDS, FAILS = "holds", "does not hold"
NOT_SHOWN = "not shown by this many problems"  # the interval reaches to both sides
UNKNOWN = "cannot be told"  # it was not measured

NO_ROW = "no row "  # how the evidence begins where the study left the row out

MAX_SPENT = 4.2  # of a budget of 4, in multiples of a chain's tokens

Json = dict[str, Any]
Verdict = tuple[str, str]  # verdict, evidence


def judge_criteria(rows: Sequence[Json], curves: dict[str, Curve]) -> list[Json]:
    """Judges every acceptance criterion.

    A difference of accuracies is judged by its 95% interval, which may leave it open. Times have no interval.

    Args:
        rows: of the study; those with an error do not count.
        curves: by name; "self_consistency" and "best_of_n" are of one pool of chains, over the rows' problems.

    Returns:
        `[{"bar", "verdict", "evidence"}]`: the criterion; one of `HOLDS`, `FAILS`, `NOT_SHOWN`, `UNKNOWN`; the numbers.
    """
    by_key = {row["key"]: row for row in rows if row["error"] is None}
    majority, best = curves.get("self_consistency"), curves.get("best_of_n")
    results = []

    def add(criterion: str, key: str, judge: Callable[[Json], Verdict]) -> None:
        verdict, evidence = judge(by_key[key]) if key in by_key else (UNKNOWN, NO_ROW + key)
        results.append({"bar": criterion, "verdict": verdict, "evidence": evidence})

    for name, curve in (("the majority of 8 chains", majority), ("the best of 8 chains by the same verifier", best)):
        add(
            f"dynamic allocation, budget 4, spends at most {MAX_SPENT}x and is no more than a point below {name}",
            "dynamic_allocation_4x",
            partial(_against_eight_chains, curve=curve),
        )
    beats_majority = partial(_beats_majority, majority=majority)
    add("tree of thoughts (3, 5) beats the majority at equal tokens", "tree_of_thoughts", beats_majority)
    for key in ("step_beam_search", "dvts", "rebase", "ets", "mcts", "particle_filter"):
        add(f"{key.replace('_', ' ')} beats the majority at equal tokens", key, beats_majority)
    add("tree of thoughts (3, 5) takes at most 3x the time of a chain, one problem alone", "tree_of_thoughts", _latency)
    add(
        "many problems at once: at least 5x the throughput of one branch after another", "tree_of_thoughts", _throughput
    )
    return results


def _against_eight_chains(row: Json, curve: Curve | None) -> Verdict:
    if curve is None:
        return UNKNOWN, "no pool of chains"
    sizes = pool_sizes(1 << (len(curve.costs) - 1))
    if 8 not in sizes:
        return UNKNOWN, "the pool has fewer than 8 chains"
    gap = paired_difference(np.array(row["correct"], float), curve.accuracy[:, sizes.index(8)])
    evidence = f"it spends {row['tokens_x']:.2f}x: {_text(gap)}"
    return (FAILS if row["tokens_x"] > MAX_SPENT else _is_above(gap, -0.01)), evidence


def _beats_majority(row: Json, majority: Curve | None) -> Verdict:
    if majority is None:
        return UNKNOWN, "no pool of chains"
    at_equal_tokens = accuracy_at(majority, row["tokens_x"])
    if at_equal_tokens is None:
        low, high = majority.costs[[0, -1]]
        return UNKNOWN, f"it takes {row['tokens_x']:.1f}x tokens; majority votes go from {low:.1f}x to {high:.1f}x"
    gap = paired_difference(np.array(row["correct"], float), at_equal_tokens)
    return _is_above(gap, 0.0), f"at {row['tokens_x']:.1f}x: {_text(gap)}"


def _latency(row: Json) -> Verdict:
    if row["latency_x"] is None:
        return UNKNOWN, "latency was not measured"
    return HOLDS if row["latency_x"] <= 3 else FAILS, f"{row['latency_x']:.2f}x ({row['latency_s']:.3g} s)"


def _throughput(row: Json) -> Verdict:
    unshared = row["one_after_another"]
    if unshared is None or unshared["throughput_ratio"] is None:
        return UNKNOWN, "it was not measured"
    evidence = (
        f"{unshared['throughput_ratio']:.1f}x in tokens per second: {row['tokens_per_s']:.0f} with all "
        f"{row['problems']} problems side by side ({row['tokens']:.0f} tokens in {row['batched_s']:.3g} s each), "
        f"{unshared['tokens_per_s']:.0f} with the first {unshared['problems']} one after another "
        f"({unshared['tokens']:.0f} tokens in {unshared['per_problem_s']:.3g} s each)"
    )
    return HOLDS if unshared["throughput_ratio"] >= 5 else FAILS, evidence


def _is_above(gap: Difference, threshold: float) -> str:
    """Returns `HOLDS` if a difference is shown to be above a threshold, `FAILS` if below, else `NOT_SHOWN`."""
    if gap.low > threshold:
        return HOLDS
    return FAILS if gap.high < threshold else NOT_SHOWN


def _text(gap: Difference) -> str:
    return f"{100 * gap.estimate:+.1f} points, 95% CI {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
