"""Fairness audit: what groups of problems are given, and whether difficulty alone explains it."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Allocation:
    """What `n` problems were given and needed; a problem may occur several times, with its chains in other orders.

    Attributes:
        groups: `[n]` str.
        problems: `[n]` int64, which problem it is.
        difficulty: `[n]`, the true success rate of a chain.
        chains: `[n]`, chains given; spend: `[n]`, cost in units of one chain.
        needed: `[n]`, chains with which the answer would have been right; more than there are where none is.
        probed, right: `[n]` bool, the answer after the probes, and the final one, is right.
        available: chains there are of a problem.
    """

    groups: np.ndarray
    problems: np.ndarray
    difficulty: np.ndarray
    chains: np.ndarray
    spend: np.ndarray
    needed: np.ndarray
    probed: np.ndarray
    right: np.ndarray
    available: int


def strata_of(difficulty: np.ndarray, num_strata: int = 5) -> np.ndarray:
    """`[n]` int64: problems that no chain solves, and quantiles of the others."""
    solvable = difficulty > 0
    strata = np.zeros(len(difficulty), np.int64)
    if solvable.any():
        edges = np.quantile(difficulty[solvable], np.arange(1, num_strata) / num_strata)
        strata[solvable] = 1 + np.searchsorted(edges, difficulty[solvable], side="right")
    return strata


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


def audit(allocation: Allocation, *, num_strata: int = 5, permutations: int = 2000, seed: int = 0) -> dict[str, Any]:
    """By group: spend, accuracy, gain per unit of spend, false-low-budget rate, and the spend gap given difficulty.

    The gain is of accuracy over that after the probes, per chain beyond the least that any problem was given. A
    false-low budget is one of a problem that was given fewer chains than would have made it right, of those that some
    number of chains would have, and came out wrong.
    """
    found: dict[str, Any] = {}
    least = allocation.spend.min()
    some_number = allocation.needed <= allocation.available
    too_little = some_number & (allocation.chains < allocation.needed) & ~allocation.right
    _, first, index = np.unique(allocation.problems, return_index=True, return_inverse=True)
    spend = np.bincount(index, allocation.spend) / np.bincount(index)  # mean over a problem's repeats
    strata = strata_of(allocation.difficulty[first], num_strata)
    for group in np.unique(allocation.groups):
        member = allocation.groups == group
        gap, p_value = permutation_test(
            spend, allocation.groups[first] == group, strata, permutations=permutations, seed=seed
        )
        beyond = allocation.spend[member].mean() - least
        gain = allocation.right[member].mean() - allocation.probed[member].mean()
        solvable = int((some_number & member).sum())
        found[str(group)] = {
            "problems": int((allocation.groups[first] == group).sum()),
            "spend": float(allocation.spend[member].mean()),
            "accuracy": float(allocation.right[member].mean()),
            "gain_per_unit": float(gain / beyond) if beyond > 0 else None,
            "false_low_budget_rate": float((too_little & member).sum() / solvable) if solvable else None,
            "spend_gap": gap,
            "spend_gap_p_value": p_value,
        }
    return found
