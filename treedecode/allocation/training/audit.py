"""Fairness audit: what groups of problems are given, and whether it differs from what they can use."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from treedecode.allocation.training.resampling import bootstrap

MIN_STRATUM = 10  # problems; smaller ones hold few of any group


@dataclass(frozen=True)
class Allocation:
    """What `n` problems were given and needed; a problem may occur several times, with its chains in other orders.

    Attributes:
        groups: `[n]` str.
        problems: `[n]` int64, which problem it is.
        difficulty: `[n]`, the share of its chains that are right.
        chains: `[n]`, chains given; spend: `[n]`, cost in units of one chain; probe_spend: `[n]`, of that the probes.
        oracle_spend: `[n]`, what the oracle spends on it with the same budget.
        needed: `[n]`, chains with which the answer would have been right; more than there are where none is.
        probed, right: `[n]` bool, the answer after the probes, and the final one, is right.
        available: chains there are of a problem.
    """

    groups: np.ndarray
    problems: np.ndarray
    difficulty: np.ndarray
    chains: np.ndarray
    spend: np.ndarray
    probe_spend: np.ndarray
    oracle_spend: np.ndarray
    needed: np.ndarray
    probed: np.ndarray
    right: np.ndarray
    available: int


def strata_of(difficulty: np.ndarray, min_size: int = MIN_STRATUM) -> np.ndarray:
    """`[n]` int64: problems of equal difficulty; neighbours go together until they are `min_size` problems."""
    _, index, counts = np.unique(difficulty, return_inverse=True, return_counts=True)
    strata, size, left = np.zeros(len(counts), np.int64), 0, int(counts.sum())
    for i, count in enumerate(counts):
        if i:
            is_full = size >= min_size and left >= min_size  # and what is left is enough for another one
            strata[i] = strata[i - 1] + is_full
            size = 0 if is_full else size
        size, left = size + count, left - count
    return strata[index]


def spend_gap(spend: np.ndarray, member: np.ndarray, strata: np.ndarray) -> float:
    """How much more a group's problems were given than others of the same difficulty; nan where none compare.

    The mean over strata of the difference of means, weighted by the group's size there (direct standardisation). Strata
    without both are left out.
    """
    mine = np.bincount(strata, member)
    others = np.bincount(strata, ~member)
    both = (mine > 0) & (others > 0)
    if not both.any():
        return float("nan")
    sums = np.bincount(strata, spend * member), np.bincount(strata, spend * ~member)
    gaps = sums[0][both] / mine[both] - sums[1][both] / others[both]
    return float(np.average(gaps, weights=mine[both]))


def permutation_test(
    spend: np.ndarray, member: np.ndarray, strata: np.ndarray, *, permutations: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The spend gap, and its two-sided p-value: how often chance alone makes one as large.

    Under the null hypothesis membership is exchangeable among problems of a stratum, so that is where it is shuffled.
    The value counts the observed one among the permutations (Phipson and Smyth, 2010), so it is valid and never 0.

    Args:
        spend, member, strata: `[n]`, one entry per problem: repeats of a problem are not exchangeable.
    """
    observed = spend_gap(spend, member, strata)
    if np.isnan(observed):
        return observed, float("nan")
    rng = np.random.default_rng(seed)
    order = np.argsort(strata, kind="stable")
    spend, member, strata = spend[order], member[order], strata[order]
    as_extreme = 1
    for _ in range(permutations):
        # sorted by (stratum, random): each stratum's members in a random order
        shuffled = member[np.lexsort((rng.random(len(member)), strata))]
        as_extreme += abs(spend_gap(spend, shuffled, strata)) >= abs(observed) - 1e-12
    return observed, as_extreme / (permutations + 1)


def audit(
    allocation: Allocation, *, min_size: int = MIN_STRATUM, permutations: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """By group: spend, accuracy, gain per unit of spend, false-low-budget rate, and spend gaps given difficulty.

    The gain is of accuracy over that after the probes, per chain beyond the group's mean spend on these. A false-low
    budget is one of a problem that was given fewer chains than would have made it right, of those that some number of
    chains would have, and came out wrong.

    A group's spend gap alone is no sign of unfairness: who knows only what is right, at which rate chains are, and what
    they cost, has one too where groups differ in these. So `excess_gap` is the gap beyond that oracle's, with its 95%
    bootstrap interval over problems (strata stay), and it is what the permutation test is of. Its null hypothesis is
    that among problems with the same share of right chains the group says nothing about what a policy spends beyond the
    oracle. A rejection is a question and no verdict: a policy that never sees the group may be rejected where prompts
    tell of the rate what that share does not, and where costs differ by group, as it need not weigh them like the
    oracle does (of a simulated one, chains of one group costing twice as much, 1 run of 3).

    Args:
        min_size: of a stratum (`strata_of`).
    """
    found: dict[str, Any] = {}
    some_number = allocation.needed <= allocation.available
    too_little = some_number & (allocation.chains < allocation.needed) & ~allocation.right
    _, first, index = np.unique(allocation.problems, return_index=True, return_inverse=True)
    # means over a problem's repeats
    spend, oracle = (np.bincount(index, x) / np.bincount(index) for x in (allocation.spend, allocation.oracle_spend))
    excess = spend - oracle
    strata = strata_of(allocation.difficulty[first], min_size)
    for group in np.unique(allocation.groups):
        member, mine = allocation.groups == group, allocation.groups[first] == group

        def gap_of(drawn: np.ndarray, mine: np.ndarray = mine) -> float:
            return spend_gap(excess[drawn], mine[drawn], strata[drawn])

        gap, p_value = permutation_test(excess, mine, strata, permutations=permutations, seed=seed)
        beyond = allocation.spend[member].mean() - allocation.probe_spend[member].mean()
        gain = allocation.right[member].mean() - allocation.probed[member].mean()
        solvable = int((some_number & member).sum())
        found[str(group)] = {
            "problems": int(mine.sum()),
            "spend": float(allocation.spend[member].mean()),
            "accuracy": float(allocation.right[member].mean()),
            "gain_per_unit": float(gain / beyond) if beyond > 0 else None,
            "false_low_budget_rate": float((too_little & member).sum() / solvable) if solvable else None,
            "spend_gap": spend_gap(spend, mine, strata),
            "oracle_spend_gap": spend_gap(oracle, mine, strata),
            "excess_gap": gap,
            "excess_gap_interval": list(bootstrap(gap_of, len(first), resamples=permutations, seed=seed)),
            "p_value": p_value,
        }
    return found
