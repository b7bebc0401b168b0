"""Bars: what a study on the shipped model is held to, and whether its numbers show it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from treedecode.common.intervals import Difference, paired_difference
from treedecode.study.analysis import accuracy_at, pool_sizes
from treedecode.study.laws import Curve

HOLDS, FAILS = "holds", "does not hold"
NOT_SHOWN = "not shown by this many problems"  # the interval has both in it
UNKNOWN = "cannot be told"  # it was not measured

MOST_SPENT = 4.2  # of a budget of 4, in multiples of a chain's tokens

Json = dict[str, Any]
Judged = tuple[str, str]  # verdict, evidence


def bars(rows: Sequence[Json], curves: dict[str, Curve]) -> list[Json]:
    """`[{"bar", "verdict", "evidence"}]`; a verdict is one of `HOLDS`, `FAILS`, `NOT_SHOWN`, `UNKNOWN`.

    A difference of accuracies is judged by its 95% interval, which may leave it open; times have no interval.

    Args:
        rows: of the study; those with an error do not count.
        curves: by name; "self_consistency" and "best_of_n" are of one pool of chains, over the rows' problems.
    """
    by_key = {row["key"]: row for row in rows if row["error"] is None}
    majority, best = curves.get("self_consistency"), curves.get("best_of_n")
    found = []

    def judge(bar: str, key: str, verdict: Callable[[Json], Judged]) -> None:
        said, evidence = verdict(by_key[key]) if key in by_key else (UNKNOWN, f"no row {key}")
        found.append({"bar": bar, "verdict": said, "evidence": evidence})

    for name, curve in (("the majority of 8 chains", majority), ("the best of 8 chains by the same verifier", best)):
        judge(
            f"dynamic allocation, budget 4, spends at most {MOST_SPENT}x and is no more than a point below {name}",
            "dynamic_allocation_4x",
            partial(_against_eight, curve=curve),
        )
    beats = partial(_beats, majority=majority)
    judge("tree of thoughts (3, 5) beats the majority at equal tokens", "tree_of_thoughts", beats)
    for key in ("step_beam_search", "dvts", "rebase", "ets", "mcts", "particle_filter"):
        judge(f"{key.replace('_', ' ')} beats the majority at equal tokens", key, beats)
    judge(
        "tree of thoughts (3, 5) takes at most 3x the time of a chain, one problem alone", "tree_of_thoughts", _latency
    )
    judge(
        "many problems at once: at least 5x the throughput of one branch after another",
        "tree_of_thoughts",
        _throughput,
    )
    return found


def _against_eight(row: Json, curve: Curve | None) -> Judged:
    if curve is None:
        return UNKNOWN, "no pool of chains"
    at = pool_sizes(1 << (len(curve.costs) - 1))
    if 8 not in at:
        return UNKNOWN, "the pool has fewer than 8 chains"
    gap = paired_difference(np.array(row["correct"], float), curve.accuracy[:, at.index(8)])
    evidence = f"it spends {row['tokens_x']:.2f}x: {_said(gap)}"
    return (FAILS if row["tokens_x"] > MOST_SPENT else _above(gap, -0.01)), evidence


def _beats(row: Json, majority: Curve | None) -> Judged:
    if majority is None:
        return UNKNOWN, "no pool of chains"
    same = accuracy_at(majority, row["tokens_x"])
    if same is None:
        low, high = majority.costs[[0, -1]]
        return UNKNOWN, f"it takes {row['tokens_x']:.1f}x tokens; majority votes go from {low:.1f}x to {high:.1f}x"
    gap = paired_difference(np.array(row["correct"], float), same)
    return _above(gap, 0.0), f"at {row['tokens_x']:.1f}x: {_said(gap)}"


def _latency(row: Json) -> Judged:
    if row["latency_x"] is None:
        return UNKNOWN, "latency was not measured"
    return HOLDS if row["latency_x"] <= 3 else FAILS, f"{row['latency_x']:.2f}x ({row['latency_s']:.3g} s)"


def _throughput(row: Json) -> Judged:
    other = row["one_after_another"]
    if other is None or other["throughput_ratio"] is None:
        return UNKNOWN, "it was not measured"
    evidence = (
        f"{other['throughput_ratio']:.1f}x in tokens per second: {row['tokens_per_s']:.0f} with all {row['problems']} "
        f"problems side by side ({row['tokens']:.0f} tokens in {row['batched_s']:.3g} s each), "
        f"{other['tokens_per_s']:.0f} with the first {other['problems']} one after another "
        f"({other['tokens']:.0f} tokens in {other['per_problem_s']:.3g} s each)"
    )
    return HOLDS if other["throughput_ratio"] >= 5 else FAILS, evidence


def _above(gap: Difference, least: float) -> str:
    """Whether a difference is shown to be above `least`, shown not to be, or neither."""
    if gap.low > least:
        return HOLDS
    return FAILS if gap.high < least else NOT_SHOWN


def _said(gap: Difference) -> str:
    return f"{100 * gap.estimate:+.1f} points, 95% CI {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
